"""A zip of a Hugging Face folder: opened like a .pt2, or refused; nothing in it runs."""

import json
import os
import stat
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from worker.engine.errors import ModelRejected
from worker.engine.programs.describe import describe
from worker.engine.programs.hugging_face.pooling import Pooling, pool
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

torch.set_num_threads(1)

CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 20, "n_positions": 16, "n_embd": 8,
    "n_layer": 1, "n_head": 2,
}  # fmt: skip
TOKENIZER = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}).encode()
FILES = {"model.safetensors": save({"transformer.wte.weight": torch.zeros(20, 8)}), "config.json": b""}


def write(path: Path, config: dict[str, object], files: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**FILES, "config.json": json.dumps(config).encode(), **(files or {})}.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("change", "files", "code"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, {}, "remote_code"),
        ({"trust_remote_code": True}, {}, "remote_code"),
        ({"_attn_implementation_internal": "a/b"}, {}, "remote_code"),
        ({"model_type": "gpt3"}, {}, "unsupported_architecture"),
        ({"architectures": ["Evil"]}, {}, "unsupported_architecture"),
        ({"n_layer": 10**6}, {}, "bad_structure"),
        ({"n_embd": 65_536, "n_head": 64}, {}, "weights_do_not_fit"),
        ({"n_embed": 8}, {}, "unknown_config_key"),
        ({}, {"pytorch_model.bin": b"x"}, "pickled_weight"),
        ({}, {"modeling.py": b"x"}, "remote_code"),
        ({"quantization_config": {"bits": 4}}, {}, "quantized_model"),
        ({"hidden_size_": 8}, {}, "unknown_config_key"),
        ({"n_head": 3}, {}, "bad_structure"),
        ({}, {"weights.pkl": b"x"}, "pickled_weight"),
        ({}, {"folder/other.json": b"x"}, "unknown_member"),
        ({}, {"../escape.json": b"x"}, "archive_member_name"),
        ({}, {"/etc/escape.json": b"x"}, "archive_member_name"),
        ({"attn_implementation": "x/kernel"}, {}, "remote_code"),
        ({"_experts_implementation": "x/kernel"}, {}, "remote_code"),
        ({"use_kernels": True}, {}, "remote_code"),
        ({"text_config": {"auto_map": {}}}, {}, "unknown_config_key"),
        ({"base_model_tp_plan": {"a": "b"}}, {}, "unknown_config_key"),
        ({"gguf_file": "/etc/passwd"}, {}, "unknown_config_key"),
        ({}, {"adapter_config.json": b'{"base_model_name_or_path": "/etc"}'}, "unknown_member"),
        ({}, {"vocab.txt": bytes(5 * 2**20)}, "archive_bomb"),
        ({}, {"model-00001-of-00001.safetensors": b"x"}, "weights_missing"),
    ],
)
def test_hostile_folders_are_refused(
    tmp_path: Path, change: dict[str, object], files: dict[str, bytes], code: str
) -> None:
    path = write(tmp_path / "m.zip", {**CONFIG, **change}, files)
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "hf")
    assert caught.value.code == code, caught.value.detail
    assert caught.value.fix


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (b'{"auto_map": ["x.Y", null], "model": {"vocab": {}}}', "auto_map"),
        (b'{"model": {"type": "BPE", "vocab": "/etc/passwd", "merges": []}}', "model: vocab"),
        (b'{"model": {"type": "WordLevel", "vocab": {"a": 0}}, "normalizer": {"type": "Mine"}}', "Mine"),
        (b"\xff", "tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_left_out_with_a_note(
    tmp_path: Path, tokenizer: bytes, words: str
) -> None:
    small: dict[str, Any] = {**CONFIG, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    program = open_program(save_zip(model, tmp_path / "m.zip", {"tokenizer.json": tokenizer}), tmp_path, "hf")
    assert program.tokenizer is None
    facts = describe(program, ())
    assert not facts.tokenizer
    (note,) = (each for each in facts.warnings if "tokenizer.json was left out" in each)
    assert words in note
    assert "no column of text can feed this model" in note


def test_a_configuration_larger_than_its_weights_takes_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "m.zip", {**CONFIG, "n_embd": 2048, "n_head": 2})
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "hf")
    assert "parameters; the weights have 640 bytes in 1 tensors" in caught.value.detail


def test_a_link_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.zip", CONFIG)
    link = zipfile.ZipInfo("tokenizer.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "hf")
    assert caught.value.code == "archive_link"


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.zip", CONFIG)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", json.dumps({**CONFIG, "n_layer": 2}))
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "hf")
    assert caught.value.code == "archive_duplicate_member"


def test_a_worker_without_transformers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.zip", CONFIG)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "hf")
    assert caught.value.code == "transformers_missing"
    assert "torch.export" in caught.value.fix


def test_values_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 2.0}
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, "rope_parameters": rope}
    with pytest.raises(ModelRejected) as caught:
        open_program(write(tmp_path / "m.zip", {**config, "num_key_value_heads": 3}), tmp_path, "hf")
    assert caught.value.code in ("bad_config", "weights_do_not_fit")


BERT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LABELS: dict[str, Any] = {"num_labels": 3}


def bert(head: str = "BertModel", **options: Any) -> Any:
    config = transformers.BertConfig(**BERT, max_position_embeddings=20, **LABELS)
    return getattr(transformers, head)(config, **options)


def roberta() -> Any:
    config = transformers.RobertaConfig(**BERT, max_position_embeddings=22, pad_token_id=1)
    return transformers.RobertaForTokenClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**BERT, num_key_value_heads=1))


def vit() -> Any:
    sizes = {key: value for key, value in BERT.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, **LABELS)
    return transformers.ViTForImageClassification(config)


def save_zip(model: Any, path: Path, files: dict[str, bytes] | None = None, root: str = "", **options: Any) -> Path:
    """Zip what save_pretrained writes, as a user would."""
    folder = path.with_suffix("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval().save_pretrained(folder, **options)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, root + file.name)
        for name, content in (files or {}).items():
            archive.writestr(root + name, content)
    return path


def run_both(program: Program, model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    inputs = program.example_inputs(3, seed=1)
    with torch.no_grad():
        expected = model.eval()(**dict(zip((each.name for each in program.signature.inputs), inputs, strict=True)))
        return list(program.module.eval()(*inputs)), expected


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: bert("BertForSequenceClassification"), ["input_ids", "attention_mask", "token_type_ids"]),
        (roberta, ["input_ids", "attention_mask"]),
        (gpt2, ["input_ids"]),
        (llama, ["input_ids"]),
        (vit, ["pixel_values"]),
    ],
    ids=["bert", "roberta", "gpt2", "llama", "vit"],
)
def test_a_folder_becomes_the_model_that_wrote_it(tmp_path: Path, make: Any, inputs: list[str]) -> None:
    torch.manual_seed(0)
    model = make()
    path = save_zip(model, tmp_path / "m.zip", {"tokenizer.json": TOKENIZER}, root="folder/")
    program = open_program(path, tmp_path, "hf")
    assert [each.name for each in program.signature.inputs] == inputs
    assert program.signature.batch_size is None
    assert program.tokenizer is not None
    assert json.loads(program.tokenizer)["model"] == {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (found,), expected = run_both(program, model)
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-5)
    assert program.notes == ()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("hugging_face")} == set()


def test_shards_are_one_model_and_can_be_opened_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert("BertForSequenceClassification")
    path = save_zip(model, tmp_path / "m.zip", max_shard_size="5KB")
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 1
    for _ in range(2):
        (found,), expected = run_both(open_program(path, tmp_path, "hf"), model)
        torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-5)


def test_shards_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    one, other = (
        save({"transformer.wte.weight": torch.zeros(20, 8)}),
        save({"transformer.wpe.weight": torch.zeros(16, 8)}),
    )
    index = {"weight_map": {"transformer.wte.weight": names[1], "transformer.wpe.weight": names[0]}}
    for files, code in (
        ({names[0]: one, names[1]: one}, "weights_damaged"),
        ({names[1]: one}, "weights_missing"),
        (
            {names[0]: one, names[1]: other, "model.safetensors.index.json": json.dumps(index).encode()},
            "weights_damaged",
        ),
    ):
        path = tmp_path / "m.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {"config.json": json.dumps(CONFIG).encode(), **files}.items():
                archive.writestr(name, content)
        with pytest.raises(ModelRejected) as caught:
            open_program(path, tmp_path, "hf")
        assert caught.value.code == code, caught.value.detail


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder.layer.0.output.dense.weight": None}, "lack 'encoder.layer.0.output.dense.weight'"),
        ({"encoder.layer.7.output.dense.weight": torch.zeros(2, 2)}, "has no 'encoder.layer.7.output.dense.weight'"),
        ({"encoder.layer.0.output.dense.weight": torch.zeros(32, 16)}, "shape differs"),
        ({"embeddings.LayerNorm.bias": torch.full((16,), torch.inf)}, "infinite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    model = bert()
    path = save_zip(model, tmp_path / "m.zip")
    changed = {**{name: value.clone() for name, value in model.state_dict().items()}, **change}
    save_file({name: value for name, value in changed.items() if value is not None}, tmp_path / "w", {"format": "pt"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "m" / "config.json", "config.json")
        archive.write(tmp_path / "w", "model.safetensors")
    with pytest.raises(ModelRejected) as caught:
        open_program(path, tmp_path, "hf")
    assert words in caught.value.detail


def test_a_number_of_heads_that_nothing_says_is_noted(tmp_path: Path) -> None:
    config = transformers.BertConfig(**{**BERT, "hidden_size": 24, "num_attention_heads": 12})
    path = save_zip(transformers.BertModel(config), tmp_path / "m.zip")
    given = json.loads((tmp_path / "m" / "config.json").read_text())
    del given["num_attention_heads"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(given))
        archive.write(tmp_path / "m" / "model.safetensors", "model.safetensors")
    warned = describe(open_program(path, tmp_path, "hf")).warnings
    assert any("num_attention_heads" in sentence and " 12," in sentence for sentence in warned), warned


def modules(*kinds: str) -> bytes:
    return json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]).encode()


def test_sentence_transformers_pool_the_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert(add_pooling_layer=False)
    layer = json.dumps(
        {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    )
    files = {"modules.json": modules("Transformer", "Pooling", "Normalize"), "1_Pooling/config.json": layer.encode()}
    program = open_program(save_zip(model, tmp_path / "m.zip", files), tmp_path, "hf")
    assert [each.name for each in program.signature.outputs] == ["sentence_embedding"]
    (found,), expected = run_both(program, model)
    mask = program.example_inputs(3, seed=1)[1]
    for row in range(3):
        mean = expected["last_hidden_state"][row][mask[row] != 0].mean(0)
        torch.testing.assert_close(found[row], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_pooling_leaves_out_what_is_masked() -> None:
    tokens, mask = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [99.0, 99.0]]]), torch.tensor([[1, 1, 0]])
    assert pool(tokens, mask, Pooling("mean", normalize=False)).tolist() == [[2.0, -3.0]]
    assert pool(tokens, mask, Pooling("max", normalize=False)).tolist() == [[3.0, -2.0]]
    assert pool(tokens, mask, Pooling("cls", normalize=False)).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize(
    ("kinds", "layer", "code"),
    [
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_mean_tokens": True}, "unsupported_modules"),
        (("Transformer", "Pooling"), {"pooling_mode_lasttoken": True}, "unsupported_modules"),
        (("Transformer", "Pooling"), None, "config_missing"),
        (("Transformer", "Pooling"), {"pooling_mode_mean_tokens": True}, "unsupported_modules"),
    ],
)
def test_pooling_that_cannot_be_built_is_refused(
    tmp_path: Path, kinds: tuple[str, ...], layer: dict[str, bool] | None, code: str
) -> None:
    files = {"modules.json": modules(*kinds)}
    if layer is not None:
        files["1_Pooling/config.json"] = json.dumps(layer).encode()
    with pytest.raises(ModelRejected) as caught:
        # A causal model has no vector for a sentence.
        open_program(save_zip(gpt2(), tmp_path / "m.zip", files), tmp_path, "hf")
    assert caught.value.code == code
