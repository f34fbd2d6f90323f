"""A state dict for a catalogue architecture: opened like a .pt2, or refused with the first differences."""

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.engine.catalogue.entry import Values
from worker.engine.catalogue.registry import CATALOGUE
from worker.engine.errors import ModelRejected
from worker.engine.programs.describe import describe
from worker.engine.programs.intake import open_program

torch.set_num_threads(1)
VALUES: Values = {"vocabulary": 50, "context": 20, "width": 32, "depth": 1, "heads": 4}


def save_gpt(path: Path, **changes: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    model = CATALOGUE["gpt"].build(VALUES, {}).eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file({**tensors, **changes}, path)
    return model


def test_weights_and_architecture_become_a_program(tmp_path: Path) -> None:
    model = save_gpt(tmp_path / "w.safetensors")
    program = open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", "gpt:heads=4")
    assert program.notes == ()
    assert [facts.shape for facts in program.signature.outputs] == [("batch", "input_ids_1", 50)]
    assert program.tied == (("transformer.wte.weight", "lm_head.weight"),)
    (tokens,) = program.example_inputs(3, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(program.module.eval()(tokens)[0], model(tokens)["logits"])


@pytest.mark.parametrize(
    ("architecture", "code"),
    [
        ("resnet20", "weights_do_not_fit"),
        ("gptt", "unknown_architecture"),
        ("gpt:head=4", "unknown_architecture"),
        ("gpt:heads=5", "unknown_architecture"),
        ("gpt:width=64", "weights_do_not_fit"),
        (None, "architecture_missing"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, architecture: str | None, code: str) -> None:
    save_gpt(tmp_path / "w.safetensors")
    with pytest.raises(ModelRejected) as caught:
        open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", architecture)
    assert caught.value.code == code
    assert "architecture" in caught.value.fix


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    save_gpt(tmp_path / "w.safetensors", **{"transformer.ln_f.weight": torch.full((32,), torch.nan)})
    with pytest.raises(ModelRejected) as caught:
        open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", "gpt:heads=4")
    assert caught.value.code == "nonfinite_weight"


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "size_bytes"),
    [
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', 4),
        (f'{{"a":{ENTRY},"b":{ENTRY}}}', 4),
        (f'{{"a":{ENTRY}}}', 3),
        (f'{{"a":{ENTRY}}}', 5),
        ('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
        ('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', 4),
        ('{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', 4),
        (
            json.dumps({str(index): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for index in range(20_001)}),
            4,
        ),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: str, size_bytes: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(size_bytes))
    with pytest.raises(ModelRejected):
        open_program(path, tmp_path, "safetensors", "resnet20")


@pytest.mark.parametrize("architecture", ["gpt", "gpt:depth=1"])
def test_what_the_weights_cannot_say_is_a_warning(tmp_path: Path, architecture: str) -> None:
    save_gpt(tmp_path / "w.safetensors")
    program = open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", architecture)
    (warning,) = (sentence for sentence in describe(program).warnings if "guess" in sentence)
    assert "attention heads is a guess: 1," in warning
    assert "gpt:heads=N" in warning


def test_a_resnet_of_another_source_is_the_same_network(tmp_path: Path) -> None:
    """Projections are told from paddings; akamaster's names and those of DataParallel are known."""
    torch.manual_seed(0)
    model = CATALOGUE["resnet20"].build({"num_classes": 3, "channels": 2}, {"layer2.0.downsample.0.weight": ()}).eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items() if "num_batches" not in name}
    renamed = {
        f"module.{name}".replace(".fc.", ".linear.").replace("downsample", "shortcut"): value
        for name, value in tensors.items()
    }
    save_file(renamed, tmp_path / "w.safetensors")
    program = open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", "resnet20")
    assert any("32 by 32 pixels was assumed" in sentence for sentence in describe(program).warnings)
    (images,) = program.example_inputs(2, seed=1)
    assert images.shape == (2, 2, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module.eval()(images)[0], model(images)["logits"], rtol=1e-4, atol=1e-5)


def test_bert_of_transformers_keeps_its_outputs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "num_labels": 3, "max_position_embeddings": 20,
    }  # fmt: skip
    model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    model.eval()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    program = open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", "bert:heads=2")
    inputs = program.example_inputs(3, seed=1)
    with torch.no_grad():
        expected = model(input_ids=inputs[0], attention_mask=inputs[1]).logits
        torch.testing.assert_close(program.module.eval()(*inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_was_cut_off_in_its_header_is_named_as_such(tmp_path: Path) -> None:
    save_gpt(tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:200])
    with pytest.raises(ModelRejected) as caught:
        open_program(tmp_path / "w.safetensors", tmp_path, "safetensors", "gpt:heads=4")
    assert caught.value.code == "file_cut_off"
    assert "ends after 200" in caught.value.detail
    assert "whole file" in caught.value.fix
