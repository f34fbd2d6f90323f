"""Strict reading of ONNX tensors: the bytes are in the file, as many as the shape needs, and not NaN."""

import math
from typing import Any

import numpy as np
from onnx import TensorProto

from worker.engine.programs.rejections import reject, shown

Array = np.ndarray[Any, Any]
MAX_RANK = 8
NUMPY_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64", TensorProto.INT64: "int64", TensorProto.INT32: "int32",
    TensorProto.INT16: "int16", TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.BOOL: "bool",
}  # fmt: skip
"""ONNX's number of a type that is taken -> its name in numpy and torch."""
_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data", TensorProto.INT64: "int64_data",
    TensorProto.INT32: "int32_data", TensorProto.INT16: "int32_data", TensorProto.INT8: "int32_data",
    TensorProto.UINT8: "int32_data", TensorProto.BOOL: "int32_data",
}  # fmt: skip
_ALL_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_dtype(number: int, where: str) -> str:
    """Return the name of a type; refuses half precision, strings, complex and few-bit numbers."""
    name = NUMPY_TYPES.get(number)
    if name is None:
        known = number in TensorProto.DataType.values()
        kind = TensorProto.DataType.Name(number) if known else str(number)
        reject(
            "unsupported_dtype",
            f"{where} is of the type {kind}; taken are {', '.join(NUMPY_TYPES.values())}.",
            "Export the model in float32; Pare makes half precision and quantized files from it.",
        )
    return name


def read_tensor(tensor: TensorProto, where: str) -> Array:
    """Return a tensor's values, read-only; refuses data in another file and sizes that do not match."""
    if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
        reject(
            "external_data",
            f"{where} lies in another file: {shown([entry.value for entry in tensor.external_data][:1])}.",
            "Write one self-contained file: onnx.save(model, path, save_as_external_data=False), or "
            "torch.onnx.export(..., external_data=False).",
        )
    dtype = np.dtype(check_dtype(tensor.data_type, where))
    shape = tuple(int(size) for size in tensor.dims)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape) or tensor.HasField("segment"):
        reject("shape_bomb", f"{where} has the shape {shown(shape)}, or is only a part of a tensor.")
    count = math.prod(shape)
    field = _FIELDS[tensor.data_type]
    given = [name for name in _ALL_FIELDS if len(getattr(tensor, name))]
    if tensor.HasField("raw_data") and tensor.raw_data:
        raw = tensor.raw_data
        if given or len(raw) != count * dtype.itemsize:
            _damaged(where, shape, dtype, len(raw))
        array = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype, copy=False)
        if dtype == np.bool_ and bool((np.frombuffer(raw, np.uint8) > 1).any()):
            reject("onnx_damaged", f"{where} stores a boolean as something else than 0 or 1.")
    else:
        values = getattr(tensor, field)
        if given not in ([], [field]) or len(values) != count:
            _damaged(where, shape, dtype, len(values) * dtype.itemsize)
        array = np.array(values, dtype=np.float64 if dtype.kind == "f" else np.int64).astype(dtype)
    if dtype.kind == "f" and bool(np.isnan(array).any()):
        reject(
            "nonfinite_weight",
            f"{where} of shape {shape} has {int(np.isnan(array).sum())} NaN values.",
            "Find out why training diverged, or repair the tensor, and export again.",
        )
    return array.reshape(shape)


def _damaged(where: str, shape: tuple[int, ...], dtype: "np.dtype[Any]", found: int) -> None:
    reject(
        "onnx_damaged",
        f"{where} of shape {shown(shape)} and type {dtype} needs {math.prod(shape) * dtype.itemsize} bytes; the file "
        f"has {found}.",
        "Export the model again; the file is cut short or was altered.",
    )
