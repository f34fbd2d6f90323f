"""Every kind of upload, over HTTP, through the real engine in its sandbox, with a chain of steps that suits it."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onnx import helper
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from app.db.session import Database
from tests.engine.programs.onnx_files import make_onnx_file
from tests.engine.programs.test_hugging_face import bert, llama, save_zip
from tests.engine.training.test_text import make_tokenizer
from tests.worker.real_service import RealService, real_service
from worker.engine import load
from worker.engine.catalogue.registry import CATALOGUE

pytestmark = pytest.mark.timeout(900)
TARGET = {"num_runs": 10}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealService]:
    directory = tmp_path_factory.mktemp("service")
    url = f"sqlite:///{directory / 'pare.sqlite3'}"
    Database(url).upgrade()
    with real_service(directory / "data", url) as found:
        yield found


def write_texts(path: Path) -> None:
    """Sentences of one grammar, so that something can be learned, with a label that the first noun decides."""
    random = np.random.default_rng(0)
    nouns, verbs, places = ["cat", "mat"], ["sat"], ["on the mat", "on a cat", "on the cat", "on a mat"]
    rows = [(random.integers(2), random.choice(verbs), random.choice(places)) for _ in range(200)]
    texts = [f"the {nouns[noun]} {verb} {place}" for noun, verb, place in rows]
    pq.write_table(pa.table({"text": texts, "noun": [int(noun) for noun, _, _ in rows]}), path)


@pytest.mark.long
def test_a_language_model_with_text_is_trained_pruned_and_quantized(service: RealService, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = service.upload(
        "/v1/models?format=hf", save_zip(llama(), tmp_path / "llama.zip", {"tokenizer.json": make_tokenizer()})
    )
    write_texts(tmp_path / "texts.parquet")
    dataset = service.upload("/v1/datasets?format=parquet", tmp_path / "texts.parquet")
    job = service.optimize(
        model,
        {
            "steps": [
                {"kind": "finetune", "epochs": 6, "learning_rate": 0.01, "batch_size": 16},
                {"kind": "prune_wanda", "sparsity": 0.3, "num_calibration_examples": 16},
                {"kind": "quantize_int4", "method": "gptq", "group_size": 16, "num_calibration_examples": 16},
            ],
            "data": {
                "dataset_id": dataset, "inputs": {"input_ids": {"column": "text", "max_tokens": 8}},
                "task": "language_modeling",
            },
            "target": TARGET,
            "outputs": {"formats": ["onnx", "packed"]},
        },
    )  # fmt: skip
    metrics = service.metrics(job)
    before, after = metrics["baseline"]["quality"], metrics["result"]["quality"]
    assert before["metric"] == after["metric"] == "perplexity"
    # Random weights know nothing of the tokens; a grammar of so few words is soon learned.
    assert after["value"] < 0.7 * before["value"]
    assert {each["step"] for each in metrics["sensitivity"]} == {1, 2}
    files = service.artifacts(job)
    assert len(files["model.packed"]) < 0.5 * len(files["model.onnx"])


@pytest.mark.long
def test_a_classifier_of_text_is_factorized_and_runs_in_integers(service: RealService, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_zip(
        bert("BertForSequenceClassification"), tmp_path / "bert.zip", {"tokenizer.json": make_tokenizer()}
    )
    model = service.upload("/v1/models?format=hf", folder)
    write_texts(tmp_path / "texts.parquet")
    dataset = service.upload("/v1/datasets?format=parquet", tmp_path / "texts.parquet")
    names = ("input_ids", "attention_mask", "token_type_ids")
    job = service.optimize(
        model,
        {
            "steps": [
                {"kind": "factorize_low_rank", "whiten": True, "num_calibration_examples": 16},
                {"kind": "finetune", "epochs": 12, "learning_rate": 0.003, "batch_size": 16},
                {"kind": "quantize_int8", "mode": "dynamic"},
            ],
            "data": {
                "dataset_id": dataset, "inputs": {name: {"column": "text", "max_tokens": 8} for name in names},
                "label_column": "noun", "task": "classification",
            },
            "target": TARGET,
        },
    )  # fmt: skip
    metrics = service.metrics(job)
    assert metrics["result"]["quality"]["metric"] == "accuracy"
    assert metrics["result"]["quality"]["value"] > 0.9
    made = onnx.load_from_string(service.artifacts(job)["model.onnx"])
    assert any("Integer" in node.op_type or "Quant" in node.op_type for node in made.graph.node)


@pytest.mark.long
def test_a_zip_of_images_trains_a_model_of_the_catalogue(service: RealService, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = CATALOGUE["vit"].build(
        {"num_classes": 4, "channels": 1, "image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}, {}
    )
    save_file(dict(network.state_dict()), tmp_path / "vit.safetensors")
    model = service.upload("/v1/models?format=safetensors&architecture=vit:heads=2", tmp_path / "vit.safetensors")
    digits = load_digits(n_class=4)
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            png = io.BytesIO()
            Image.fromarray((image * 15).astype(np.uint8)).save(png, "PNG")
            part = "test" if index % 5 == 0 else "train"
            archive.writestr(f"{part}/digit-{label}/{index}.png", png.getvalue())
    dataset = service.upload("/v1/datasets?format=images", tmp_path / "digits.zip")
    name = service.client.get(f"/v1/models/{model}").json()["facts"]["inputs"][0]["name"]
    job = service.optimize(
        model,
        {
            "steps": [
                {"kind": "train", "epochs": 6, "learning_rate": 0.005},
                {"kind": "prune_structured", "ratio": 0.25, "round_to": 2},
                {"kind": "finetune", "epochs": 2},
                {"kind": "share_weights", "bits": 5},
            ],
            "data": {
                "dataset_id": dataset, "split_column": "split", "label_column": "label", "task": "classification",
                "inputs": {name: {"column": "image", "layout": "nhwc_to_nchw", "scale": 1 / 255}},
            },
            "target": TARGET,
        },
    )  # fmt: skip
    metrics = service.metrics(job)
    assert metrics["result"]["quality"]["value"] > 0.85
    assert metrics["result"]["quality"]["num_examples"] == len(range(0, len(digits.images), 5))
    assert metrics["result"]["parameters"] < metrics["baseline"]["parameters"]
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for file, content in service.artifacts(job).items():
        (folder / file).write_bytes(content)
    samples, expected = load.load_samples(folder)
    found = load.load(folder / "model.packed")(samples)
    for output, wanted in expected.items():
        np.testing.assert_allclose(found[output], wanted, atol=1e-4)


@pytest.mark.long
def test_an_onnx_file_becomes_a_static_integer_one(service: RealService, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {
        "conv.weight": random.standard_normal((8, 1, 3, 3)).astype(np.float32) * 0.3,
        "conv.bias": np.zeros(8, np.float32),
        "fc.weight": random.standard_normal((10, 128)).astype(np.float32) * 0.1,
        "fc.bias": np.zeros(10, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight", "conv.bias"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]
    file = make_onnx_file(tmp_path / "net.onnx", nodes, {"image": ("n", 1, 8, 8)}, weights, ("logits",))
    model = service.upload("/v1/models?format=onnx", file)
    digits = load_digits()
    save_file(
        {
            "image": torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1),
            "label": torch.tensor(digits.target),
        },
        tmp_path / "digits.safetensors",
    )
    dataset = service.upload("/v1/datasets?format=safetensors", tmp_path / "digits.safetensors")
    job = service.optimize(
        model,
        {
            "steps": [
                {"kind": "finetune", "epochs": 4, "learning_rate": 0.005},
                {"kind": "prune_magnitude", "sparsity": 0.3},
                {"kind": "quantize_int8", "mode": "static", "num_calibration_examples": 64},
            ],
            "data": {
                "dataset_id": dataset, "label_column": "label", "task": "classification",
                "inputs": {"image": {"column": "image", "scale": 1 / 16}},
            },
            "target": TARGET,
        },
    )  # fmt: skip
    metrics = service.metrics(job)
    assert metrics["result"]["quality"]["value"] > 0.85
    assert metrics["comparison"]["file_ratio"] < 0.9
    manifest = json.loads(service.artifacts(job)["manifest.json"])
    assert manifest["made_from"]["model"]["format"] == "onnx"
