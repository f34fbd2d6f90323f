"""All operators of ONNX that can be imported. Anything else is refused by name."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.programs.onnx_import import convolutions, layers
from worker.engine.programs.onnx_import.call import Call, Operator
from worker.engine.programs.onnx_import.recurrent import recurrent
from worker.engine.programs.onnx_import.table_elementwise import ELEMENTWISE
from worker.engine.programs.onnx_import.table_shapes import SHAPES


def _dropout(call: Call) -> Any:
    training = call.known(2)
    if call.wants(1) or (call.has(2) and (training is None or bool(training.any()))):
        return call.refuse("it is in training mode, or its mask is read")
    return call.tensor(0)


def _einsum(call: Call) -> Any:
    return torch.einsum(call.attribute("equation"), *(call.tensor(index) for index in range(len(call))))


def _normalize(call: Call) -> Any:
    tensor = call.tensor(0)
    axis, order = call.attribute("axis", -1), call.attribute("p", 2)
    return tensor / torch.linalg.vector_norm(tensor, order, axis, keepdim=True)


def _split_heads(call: Call, tensor: Tensor, count: int | None) -> Tensor:
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() != 3 or not count:
        return call.refuse("its arguments have neither 4 axes nor a number of heads")  # type: ignore[no-any-return]
    batch, length, _ = tensor.shape
    return tensor.reshape(batch, length, count, -1).transpose(1, 2)


def _attention(call: Call) -> Any:
    if any(call.has(index) for index in range(4, len(call))) or any(call.wants(index) for index in range(1, 4)):
        return call.refuse("past and present keys are not taken")
    causal, mask = bool(call.attribute("is_causal", 0)), call.tensor(3) if call.has(3) else None
    if call.attribute("softcap", 0.0) or (causal and mask is not None):
        return call.refuse("softcap, and a mask on top of a causal one, are not taken")
    heads = (call.attribute("q_num_heads"), *[call.attribute("kv_num_heads")] * 2)
    query, key, value = (_split_heads(call, call.tensor(index), heads[index]) for index in range(3))
    result = functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=call.attribute("scale"),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return result if call.tensor(0).dim() == 4 else result.transpose(1, 2).flatten(2)


TABLE: dict[str, Operator] = {
    **ELEMENTWISE,
    **SHAPES,
    "Conv": convolutions.convolution,
    "ConvTranspose": convolutions.transposed_convolution,
    "MaxPool": convolutions.max_pool,
    "AveragePool": convolutions.average_pool,
    "GlobalAveragePool": convolutions.global_average_pool,
    "GlobalMaxPool": convolutions.global_max_pool,
    "Resize": convolutions.resize,
    "Upsample": convolutions.resize,
    "LRN": convolutions.local_response_norm,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    "BatchNormalization": layers.batch_norm,
    "LayerNormalization": layers.layer_norm,
    "RMSNormalization": layers.rms_norm,
    "GroupNormalization": layers.group_norm,
    "InstanceNormalization": layers.instance_norm,
    "PRelu": layers.prelu,
    "LSTM": recurrent,
    "GRU": recurrent,
    "RNN": recurrent,
    "Attention": _attention,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "LpNormalization": _normalize,
}
"""Operator -> what computes its results, as a tensor or a tuple of them."""
