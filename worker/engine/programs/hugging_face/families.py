"""The architectures of transformers that Pare builds: their configuration keys with bounds, and their heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from worker.engine.programs.json_reader import boolean, integer, items, number, record
from worker.engine.programs.rejections import reject, shown

Check = Callable[[Any, str], Any]
Kind = Literal["encoder", "decoder", "image"]

MAX_LAYERS = 256
_ACTIVATIONS = (
    *("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu", "silu", "swish"),
    *("tanh", "mish", "relu2"),
)


@dataclass(frozen=True)
class Family:
    """One model_type: what shapes it, and which of its classes are built."""

    config: str
    """Class of transformers that holds its configuration."""
    kind: Kind
    fields: dict[str, Check]
    """Configuration key -> check of its value. A key that is neither here nor in IGNORED is refused."""
    heads: tuple[str, ...]
    """Classes of transformers that `architectures` may name."""
    position_offset: int = 0
    """Positions that the model keeps for padding: max_position_embeddings counts them."""
    reads_segments: bool = False
    """Whether it takes token_type_ids."""


def _size(low: int, high: int) -> Check:
    return lambda value, where: integer(value, where, low, high)


def _fixed(*allowed: Any) -> Check:
    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(each) and value == each for each in allowed):
            words = ", ".join(repr(each) for each in allowed)
            reject("unsupported_config", f"{where} is {shown(value)}; Pare builds the model only with {words}.")
        return value

    return check


def _nullable(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _fraction(value: Any, where: str) -> float:
    found = number(value, where)
    if isinstance(found, str) or not 0.0 <= found <= 1.0:
        reject("bad_structure", f"{where} is {shown(value)}; a number from 0 to 1 is needed.")
    return found


def _positive(value: Any, where: str) -> float:
    found = number(value, where)
    if isinstance(found, str) or not 0.0 < found <= 1e9:
        reject("bad_structure", f"{where} is {shown(value)}; a number above 0 and up to 1e9 is needed.")
    return found


def _rope(value: Any, where: str) -> dict[str, Any]:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "rope_theta")
    given = record(value, where, (), ("rope_type", "type", "original_max_position_embeddings", *keys))
    checked: dict[str, Any] = {key: _positive(given[key], f"{where}.{key}") for key in keys if key in given}
    for key in ("rope_type", "type"):
        if key in given:
            checked[key] = _fixed("default", "linear", "llama3")(given[key], f"{where}.{key}")
    if "original_max_position_embeddings" in given:
        checked["original_max_position_embeddings"] = _length(given["original_max_position_embeddings"], where)
    return checked


def _layer_types(value: Any, where: str) -> list[str]:
    return [_fixed("full_attention")(each, where) for each in items(value, where, MAX_LAYERS)]


_vocabulary, _width, _layers, _heads = _size(1, 2_000_000), _size(1, 65_536), _size(1, MAX_LAYERS), _size(1, 1024)
_length, _activation, _epsilon, _flag = _size(1, 4_000_000), _fixed(*_ACTIVATIONS), _fraction, boolean
_off = _fixed(False)

_TRANSFORMER: dict[str, Check] = {
    "vocab_size": _vocabulary, "hidden_size": _width, "num_hidden_layers": _layers, "num_attention_heads": _heads,
    "intermediate_size": _size(1, 262_144), "hidden_act": _activation, "max_position_embeddings": _length,
    "tie_word_embeddings": _flag,
}  # fmt: skip
_BERT: dict[str, Check] = {
    **_TRANSFORMER, "hidden_dropout_prob": _fraction, "attention_probs_dropout_prob": _fraction,
    "layer_norm_eps": _epsilon, "type_vocab_size": _size(1, 64), "classifier_dropout": _nullable(_fraction),
    "is_decoder": _off, "add_cross_attention": _off, "position_embedding_type": _fixed("absolute"),
}  # fmt: skip
_LLAMA: dict[str, Check] = {
    **_TRANSFORMER, "num_key_value_heads": _heads, "head_dim": _nullable(_size(1, 1024)), "rms_norm_eps": _epsilon,
    "rope_parameters": _rope, "rope_scaling": _nullable(_rope), "rope_theta": _positive,
    "attention_bias": _flag, "mlp_bias": _flag, "attention_dropout": _fraction, "pretraining_tp": _fixed(1),
}  # fmt: skip


def _encoder(prefix: str, *others: str) -> tuple[str, ...]:
    heads = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
    return (f"{prefix}Model", *(f"{prefix}{head}" for head in heads), *others)


FAMILIES: dict[str, Family] = {
    "bert": Family("BertConfig", "encoder", _BERT, _encoder("Bert"), reads_segments=True),
    "roberta": Family("RobertaConfig", "encoder", _BERT, _encoder("Roberta"), position_offset=2),
    "xlm-roberta": Family("XLMRobertaConfig", "encoder", _BERT, _encoder("XLMRoberta"), position_offset=2),
    "mpnet": Family(
        "MPNetConfig",
        "encoder",
        {**_BERT, "relative_attention_num_buckets": _size(1, 1024)},
        _encoder("MPNet"),
        position_offset=2,
    ),
    "electra": Family(
        "ElectraConfig",
        "encoder",
        {
            **_BERT,
            "embedding_size": _width,
            "summary_type": _fixed("first"),
            "summary_use_proj": _flag,
            "summary_activation": _nullable(_activation),
            "summary_last_dropout": _fraction,
        },
        _encoder("Electra"),
        reads_segments=True,
    ),
    "albert": Family(
        "AlbertConfig",
        "encoder",
        {
            **_BERT,
            "embedding_size": _width,
            "num_hidden_groups": _layers,
            "inner_group_num": _size(1, 16),
            "classifier_dropout_prob": _fraction,
        },
        _encoder("Albert"),
        reads_segments=True,
    ),
    "distilbert": Family(
        "DistilBertConfig",
        "encoder",
        {
            "vocab_size": _vocabulary, "max_position_embeddings": _length, "sinusoidal_pos_embds": _flag,
            "n_layers": _layers, "n_heads": _heads, "dim": _width, "hidden_dim": _size(1, 262_144),
            "dropout": _fraction, "attention_dropout": _fraction, "activation": _activation, "qa_dropout": _fraction,
            "seq_classif_dropout": _fraction, "tie_word_embeddings": _flag,
        },
        _encoder("DistilBert"),
    ),
    "gpt2": Family(
        "GPT2Config",
        "decoder",
        {
            "vocab_size": _vocabulary, "n_positions": _length, "n_ctx": _length, "n_embd": _width, "n_layer": _layers,
            "n_head": _heads, "n_inner": _nullable(_size(1, 262_144)), "activation_function": _activation,
            "resid_pdrop": _fraction, "embd_pdrop": _fraction, "attn_pdrop": _fraction, "layer_norm_epsilon": _epsilon,
            "scale_attn_weights": _flag, "scale_attn_by_inverse_layer_idx": _flag, "reorder_and_upcast_attn": _off,
            "add_cross_attention": _off, "tie_word_embeddings": _flag,
        },
        ("GPT2Model", "GPT2LMHeadModel"),
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "decoder",
        {
            **_TRANSFORMER, "attention_dropout": _fraction, "hidden_dropout": _fraction,
            "classifier_dropout": _fraction, "layer_norm_eps": _epsilon, "use_parallel_residual": _flag,
            "attention_bias": _flag, "is_decoder": _flag,
            "rope_parameters": _rope, "rope_scaling": _nullable(_rope), "rotary_pct": _fraction,
            "rotary_emb_base": _positive,
        },
        ("GPTNeoXModel", "GPTNeoXForCausalLM"),
    ),
    "opt": Family(
        "OPTConfig",
        "decoder",
        {
            "vocab_size": _vocabulary, "hidden_size": _width, "num_hidden_layers": _layers,
            "ffn_dim": _size(1, 262_144), "max_position_embeddings": _length, "do_layer_norm_before": _flag,
            "_remove_final_layer_norm": _flag,
            "word_embed_proj_dim": _width, "dropout": _fraction, "attention_dropout": _fraction,
            "num_attention_heads": _heads, "activation_function": _activation, "layerdrop": _fraction,
            "activation_dropout": _fraction, "enable_bias": _flag, "layer_norm_elementwise_affine": _flag,
            "tie_word_embeddings": _flag,
        },
        ("OPTModel", "OPTForCausalLM"),
    ),
    "llama": Family("LlamaConfig", "decoder", _LLAMA, ("LlamaModel", "LlamaForCausalLM")),
    "mistral": Family(
        "MistralConfig",
        "decoder",
        {**_LLAMA, "sliding_window": _nullable(_length)},
        ("MistralModel", "MistralForCausalLM"),
    ),
    "qwen2": Family(
        "Qwen2Config",
        "decoder",
        {
            **_LLAMA, "use_sliding_window": _off, "sliding_window": _nullable(_length),
            "max_window_layers": _size(0, 4096), "layer_types": _layer_types,
        },
        ("Qwen2Model", "Qwen2ForCausalLM"),
    ),
    "vit": Family(
        "ViTConfig",
        "image",
        {
            "hidden_size": _width, "num_hidden_layers": _layers, "num_attention_heads": _heads,
            "intermediate_size": _size(1, 262_144), "hidden_act": _activation, "hidden_dropout_prob": _fraction,
            "attention_probs_dropout_prob": _fraction, "layer_norm_eps": _epsilon, "image_size": _size(1, 4096),
            "patch_size": _size(1, 1024), "num_channels": _size(1, 64), "qkv_bias": _flag,
            "encoder_stride": _size(1, 1024), "pooler_output_size": _nullable(_width), "pooler_act": _activation,
        },
        ("ViTModel", "ViTForImageClassification"),
    ),
}  # fmt: skip
"""model_type -> what Pare knows of it."""

IGNORED = frozenset(
    [
        "_name_or_path", "architectures", "bos_token_id", "bad_words_ids", "begin_suppress_tokens",
        "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "directionality",
        "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
        "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
        "gradient_checkpointing", "id2label", "init_std", "initializer_factor", "initializer_range",
        "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id",
        "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
        "pooler_type", "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
        "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens", "task_specific_params",
        "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
        "torchscript", "transformers_version", "typical_p", "unk_token_id", "use_bfloat16", "use_cache",
        "net_structure_type", "num_memory_blocks", "gap_size", "down_scale_factor", "embedding_dropout_prob",
        "cls_token_id", "mask_token_id", "attention_window",
    ]
)  # fmt: skip
"""Keys that change nothing in the module Pare builds: generation, initialization, labels, provenance, old defaults."""
