"""A Hugging Face folder, a state dict and an ONNX file go through the whole engine, as a .pt2 does."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save, save_file

from tests.engine.process import Finished, digest, plan_of, run
from tests.engine.programs.onnx_files import make_onnx_file
from worker.engine.catalogue.registry import CATALOGUE

pytestmark = pytest.mark.timeout(300)


def optimize(tmp_path: Path, file: Path, **model: Any) -> Finished:
    """Prune the file, which must come out of the pipeline with every artifact."""
    named = {"file": f"model.{model['format']}", "sha256": digest(file), **model}
    recipe = {
        "steps": [{"kind": "prune_magnitude", "sparsity": 0.5}],
        "target": {"num_runs": 30},
        "outputs": {"formats": ["onnx", "pt2", "safetensors"]},
    }
    plan = plan_of("optimize", model=named, recipe=recipe, isolation=["none"])
    finished = run(tmp_path / "job", plan, {named["file"]: file})
    assert finished.good.metrics is not None
    assert finished.good.metrics.steps[0].kind == "prune_magnitude"
    assert {"model.onnx", "model.pt2", "model.safetensors"} <= finished.artifacts.keys()
    return finished


def made_from(finished: Finished) -> dict[str, Any]:
    manifest = json.loads((finished.directory / "out" / "artifacts" / "manifest.json").read_text())
    origin: dict[str, Any] = manifest["made_from"]["model"]
    return origin


@pytest.mark.long
def test_a_hugging_face_folder_is_optimized(tmp_path: Path) -> None:
    # Made by hand: only the engine's process needs transformers.
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 20, "n_positions": 16, "n_embd": 8,
        "n_layer": 1, "n_head": 2,
    }  # fmt: skip
    shapes = {
        "wte.weight": (20, 8), "wpe.weight": (16, 8), "h.0.ln_1.weight": (8,), "h.0.ln_1.bias": (8,),
        "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,), "h.0.attn.c_proj.weight": (8, 8),
        "h.0.attn.c_proj.bias": (8,), "h.0.ln_2.weight": (8,), "h.0.ln_2.bias": (8,), "h.0.mlp.c_fc.weight": (8, 32),
        "h.0.mlp.c_fc.bias": (32,), "h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,),
        "ln_f.weight": (8,), "ln_f.bias": (8,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    file = tmp_path / "folder.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.safetensors", save(weights, {"format": "pt"}))
    finished = optimize(tmp_path, file, format="hf")
    assert made_from(finished) == {"sha256": digest(file), "format": "hf", "architecture": None}


def test_a_state_dict_is_optimized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CATALOGUE["vit"].build(
        {"num_classes": 3, "channels": 1, "image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}, {}
    )
    save_file(dict(module.state_dict()), tmp_path / "w.safetensors")
    finished = optimize(tmp_path, tmp_path / "w.safetensors", format="safetensors", architecture="vit:heads=2")
    origin = made_from(finished)
    assert (origin["format"], origin["architecture"]) == ("safetensors", "vit:heads=2")


def test_an_onnx_file_is_optimized(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32) * 0.3
        for name, shape in {
            "conv.weight": (8, 1, 3, 3), "conv.bias": (8,), "bn.weight": (8,), "bn.bias": (8,), "bn.running_mean": (8,),
            "fc.weight": (3, 128), "fc.bias": (3,),
        }.items()
    }  # fmt: skip
    tensors["bn.running_var"] = np.ones(8, np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight", "conv.bias"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node(
            "BatchNormalization",
            ["a", *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var"))],
            ["b"],
        ),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]
    file = make_onnx_file(tmp_path / "net.onnx", nodes, {"image": ("n", 1, 8, 8)}, tensors, ("logits",))
    finished = optimize(tmp_path, file, format="onnx")
    assert made_from(finished) == {"sha256": digest(file), "format": "onnx", "architecture": None}
    stored = load_file(finished.directory / "out" / "artifacts" / "model.safetensors")
    assert {"conv.weight", "bn.running_var", "fc.weight"} <= stored.keys()
    assert float((stored["fc.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
