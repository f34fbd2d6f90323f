"""Load and check a model made by Pare, without Pare. Keep this file beside manifest.json and the model files.

    python load.py [--file model.onnx] [--check]

runs the sample input and prints the largest difference to the sample output; with --check it exits with 1 when the
difference is above the tolerance in manifest.json. From Python:

    predict = load("model.onnx")                  # or "model.packed", "model.pt2"; load("model.pt2", "cuda") on a GPU
    outputs = predict({"input": array})           # dictionaries of numpy arrays by name
    weights = load_weights("model.packed")        # or "model.safetensors": a dictionary of numpy arrays by name

`python load.py --unpack model.onnx` writes model.packed as an ordinary ONNX file. Needs numpy, and onnxruntime for
.onnx and .packed, torch for .pt2, safetensors for .safetensors. Digests are verified first.

model.aoti.pt2 is native code that a worker of Pare compiled (AOTInductor), and loading it runs it: do so where you
trust who runs that service. It runs on machines like the worker's, with the worker's release of torch, on the device it
was compiled for; manifest.json says which.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Predict = Callable[[Arrays], Arrays]


class WrongMachine(RuntimeError):
    """A compiled model cannot run here."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return what manifest.json says about the files beside it."""
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def verify_digest(path: Path) -> None:
    """Raise ValueError when the file is not, byte for byte, the one in the manifest."""
    expected = read_manifest(path.parent)["files"][path.name]["sha256"]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path.name} has sha256 {digest.hexdigest()}, the manifest says {expected}")


def load(path: str | Path, device: str = "cpu") -> Predict:
    """Return a function from named input arrays to named output arrays; `device` is where torch runs model.pt2."""
    path = Path(path).resolve()
    verify_digest(path)
    manifest = read_manifest(path.parent)
    signature = manifest["signature"]
    inputs, outputs = ([each["name"] for each in signature[side]] for side in ("inputs", "outputs"))
    if path.suffix in (".onnx", ".packed"):
        return _load_onnx(str(path) if path.suffix == ".onnx" else unpack(path.read_bytes()), inputs, outputs)
    if path.name in manifest.get("compiled", ()):
        return _load_compiled(path, inputs, outputs, manifest["compiled"][path.name])
    if path.suffix == ".pt2":
        return _load_pt2(path, inputs, outputs, device)
    raise ValueError(f"{path.name} is not a model; load takes .onnx, .packed and .pt2, load_weights .safetensors")


def _load_onnx(model: str | bytes, inputs: list[str], outputs: list[str]) -> Predict:
    # ONNX Runtime 1.32 reports sessions to its maker unless told not to before it is imported (its Privacy.md).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    used = {each.name for each in session.get_inputs()}

    def predict(arrays: Arrays) -> Arrays:
        _check_names(arrays, inputs)
        feed = {name: array for name, array in arrays.items() if name in used}
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return predict


def _load_pt2(path: Path, inputs: list[str], outputs: list[str], device: str) -> Predict:
    import torch
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(str(path))
    module = (program if device == "cpu" else move_to_device_pass(program, device)).module()

    def predict(arrays: Arrays) -> Arrays:
        _check_names(arrays, inputs)
        with torch.inference_mode():
            result = module(*(torch.from_numpy(np.ascontiguousarray(arrays[name])).to(device) for name in inputs))
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return {name: tensor.cpu().numpy() for name, tensor in zip(outputs, tensors, strict=True)}

    return predict


def _load_compiled(path: Path, inputs: list[str], outputs: list[str], facts: dict[str, Any]) -> Predict:
    try:
        import torch
    except ImportError:
        raise WrongMachine(f"it needs torch {facts['torch']}, and there is none: pip install torch") from None
    _check_machine(facts)
    # Compiled code trusts its inputs, unless it is told to compare their types and sizes with those of the model first.
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    # What torch._inductor.aoti_load_package opens too, after it has compiled something to see what the processor can.
    model = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def predict(arrays: Arrays) -> Arrays:
        _check_names(arrays, inputs)
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(arrays[name])).to(facts["device"]) for name in inputs]
            results = model.run(tensors)
        return {name: tensor.cpu().numpy() for name, tensor in zip(outputs, results, strict=True)}

    return predict


def _check_machine(facts: dict[str, Any]) -> None:
    import torch

    release, here = facts["torch"].partition("+")[0], torch.__version__.partition("+")[0]
    if here != release:
        raise WrongMachine(
            f"it was compiled for torch {release}, and this is torch {here}: pip install torch=={release}"
        )
    system = f"{platform.system()} {platform.machine()}"
    if system != f"{facts['system']} {facts['machine']}":
        raise WrongMachine(f"it was compiled for {facts['system']} {facts['machine']}, and this is {system}")
    if facts["device"] == "cuda":
        if not torch.cuda.is_available():
            raise WrongMachine("it was compiled for an NVIDIA GPU, and torch sees none")
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        if capability != facts["compute_capability"]:
            raise WrongMachine(
                f"it was compiled for GPUs of compute capability {facts['compute_capability']}, and this one has "
                f"{capability}"
            )
    has = torch.cpu.get_capabilities()
    lacks = [name for name in facts["instruction_sets"] if not has.get(name)]
    if lacks:
        raise WrongMachine(
            f"it was compiled for a processor with {', '.join(lacks)}, which this one lacks: have the job done by a "
            "worker on a machine like this one"
        )


def load_weights(path: str | Path) -> Arrays:
    """Return the weights in a .packed or .safetensors file."""
    path = Path(path).resolve()
    verify_digest(path)
    if path.suffix == ".packed":
        _, weights, tied = read_packed(path.read_bytes())
        return weights | {alias: weights[name] for alias, name in tied.items()}
    from safetensors.numpy import load_file

    return load_file(path)


def load_samples(directory: Path) -> tuple[Arrays, Arrays]:
    """Return the sample inputs and the outputs that the model gave for them when it was made."""
    samples = []
    for name in ("sample_input.npz", "sample_output.npz"):
        verify_digest(directory / name)
        with np.load(directory / name, allow_pickle=False) as file:
            samples.append({key: file[key] for key in file.files})
    return samples[0], samples[1]


def largest_difference(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Return the largest absolute difference; infinite where only one of the two is a finite number."""
    if expected.shape != actual.shape:
        return float("inf")
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(wide - other))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def compare_with_sample(path: str | Path, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Run the sample input and return, for each output, the largest difference and its tolerance."""
    path = Path(path).resolve()
    inputs, expected = load_samples(path.parent)
    manifest = read_manifest(path.parent)
    actual = load(path, device)(inputs)
    tolerances = manifest.get("compiled", {}).get(path.name, manifest)["tolerances"]
    return {name: (largest_difference(expected[name], actual[name]), float(tolerances[name])) for name in expected}


def _check_names(arrays: Arrays, inputs: list[str]) -> None:
    if set(arrays) != set(inputs):
        raise ValueError(f"the model takes the inputs {inputs}, not {sorted(arrays)}")


# The packed format: the graph compressed by LZMA, then every weight in as few bytes as it has bits. Sizes are checked
# against each other before anything is allocated; a file that is not what it says raises ValueError.

MAGIC = b"PAREPK01"
LZMA_FILTER = {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}
MAX_EXPANSION, FREE_BYTES = 4096, 1 << 24
"""Unpacked, a file takes at most so many times its bytes, and so many more."""
SYMBOLS_PER_LANE, MAX_LANES, LOWEST_STATE = 1024, 8192, 1 << 16
DTYPES = {1: "f4", 2: "u1", 3: "i1", 6: "i4", 7: "i8", 9: "b1", 10: "f2", 11: "f8"}
"""ONNX's number of a type -> numpy's name; everything is little-endian."""


def read_packed(data: bytes) -> tuple[bytes, Arrays, dict[str, str]]:
    """Return a packed file's ONNX graph without weights, its weights by name, and further names of tied weights."""
    _require(data.startswith(MAGIC), f"it does not begin with {MAGIC.decode()}")
    limit = MAX_EXPANSION * len(data) + FREE_BYTES
    body = _Reader(data, len(MAGIC))
    size = body.read_number()
    compressed = body.read_bytes(body.read_number())
    _require(size <= limit, f"{size} bytes of graph are too many for a file of {len(data)}")
    try:
        header = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[LZMA_FILTER]).decompress(compressed, size + 1)
    except lzma.LZMAError as failure:
        raise ValueError(f"the packed file is damaged: {failure}") from failure
    _require(len(header) == size, "its graph has another size than it says")
    reader = _Reader(header)
    graph = reader.read_bytes(reader.read_number())
    names = reader.read_names()
    types, codings, ranks = (reader.read_bytes(len(names)) for _ in range(3))
    shapes = [tuple(reader.read_number() for _ in range(rank)) for rank in ranks]
    aliases = {alias: reader.read_number() for alias in reader.read_names()}
    known = set(types) <= DTYPES.keys() and all(i < len(names) for i in aliases.values())
    _require(known, "a weight has an unknown type, or a tied one is not there")
    dtypes = [np.dtype(DTYPES[kind]) for kind in types]
    needed = sum(math.prod(shape) * max(dtype.itemsize, 4) for shape, dtype in zip(shapes, dtypes, strict=True))
    _require(needed <= limit, f"{needed} bytes of weights are too many for a file of {len(data)}")
    weights: Arrays = {}
    for kind in sorted(set(types)):
        pool = [i for i, coding in enumerate(codings) if coding == 0 and types[i] == kind]
        sizes = [math.prod(shapes[i]) for i in pool]
        values = _read_planes(body, (sum(sizes),), np.dtype(DTYPES[kind]))
        for i, end, size in zip(pool, itertools.accumulate(sizes), sizes, strict=True):
            weights[names[i]] = values[end - size : end].reshape(shapes[i])
    for name, coding, shape, dtype in zip(names, codings, shapes, dtypes, strict=True):
        if coding:
            _require(math.prod(shape) > 0 < len(shape), f"{name} is coded though it is a single number or none")
            weights[name] = _read_tensor(body, coding, shape, dtype, limit).reshape(shape).astype(dtype)
    _require(body.position == len(data), "bytes are left over at its end")
    return graph, weights, {alias: names[i] for alias, i in aliases.items()}


def unpack(data: bytes) -> bytes:
    """Return a packed file as an ordinary ONNX file."""
    # Protobuf merges a message that is there twice, so the weights can simply follow the graph without them.
    graph, weights, _ = read_packed(data)
    kinds = {np.dtype(name): kind for kind, name in DTYPES.items()}
    tensors = []
    for name, array in weights.items():
        head = b"".join(b"\x08" + _number(size) for size in array.shape) + b"\x10" + _number(kinds[array.dtype])
        tensors.append(_field(5, head + _field(8, name.encode()) + _field(9, array.tobytes())))
    return graph + _field(7, b"".join(tensors))


class _Reader:
    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    def read_bytes(self, count: int) -> bytes:
        _require(count <= len(self.data) - self.position, "it ends too early")
        self.position += count
        return self.data[self.position - count : self.position]

    def read_number(self) -> int:
        value = shift = 0
        while (byte := self.read_bytes(1)[0]) >= 0x80 and shift < 56:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
        return value | byte << shift

    def read_names(self) -> list[str]:
        text = self.read_bytes(self.read_number()).decode()
        names = text.split("\n") if text else []
        _require(len(set(names)) == len(names), "two weights have the same name")
        return names

    def read_words(self, count: int, dtype: str) -> Array:
        return np.frombuffer(self.read_bytes(count * np.dtype(dtype).itemsize), dtype)

    def read_bits(self, count: int, width: int) -> Array:
        bits = np.unpackbits(self.read_words(-(-count * width // 8), "u1"), count=count * width, bitorder="little")
        columns = np.packbits(bits.reshape(count, width), axis=1, bitorder="little")
        return columns[:, 0] if width <= 8 else columns[:, 0] + columns[:, 1].astype(np.uint32) * 256


def _read_symbols(reader: _Reader, shape: tuple[int, ...], *, plain: bool = False) -> Array:
    """Return one stream as uint8 of the shape."""
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, np.uint8)
    extra, form = divmod(reader.read_bytes(1)[0], 16)
    if form == 0:
        return np.full(shape, reader.read_bytes(1)[0], np.uint8)
    if form == 1:
        _require(1 <= extra <= 8, "a stream has more than 8 bits a symbol")
        return (reader.read_words(count, "u1") if extra == 8 else reader.read_bits(count, extra)).reshape(shape)
    if form == 2:
        return _read_rans(reader, count, extra).reshape(shape)
    _require(form == 3 and not plain, f"a stream has the form {form}")
    frequent, m, n = reader.read_bytes(3)
    _require(0 < n < m <= 16 and math.comb(m, n) <= 256, "a pattern is not n of m")
    _require(extra < len(shape) and m <= shape[extra], "a pattern has longer blocks than its tensor")
    outer = shape[:extra] + shape[extra + 1 :]
    width = -(-shape[extra] // m)
    ways = np.array(list(itertools.combinations(range(m), n)))
    chosen = _read_symbols(reader, (math.prod(outer) * width,), plain=True)
    _require(int(chosen.max()) < len(ways), "a pattern is not n of m")
    blocks = np.full((len(chosen), m), frequent, np.uint8)
    np.put_along_axis(blocks, ways[chosen], _read_symbols(reader, (len(chosen) * n,), plain=True).reshape(-1, n), 1)
    return np.moveaxis(blocks.reshape(*outer, width * m)[..., : shape[extra]], -1, extra)


def _read_rans(reader: _Reader, count: int, precision: int) -> Array:
    """Return symbols coded by interleaved rANS (Duda 2013): one turn of the loop decodes one symbol of every lane."""
    lanes = min(max(count // SYMBOLS_PER_LANE, 1), MAX_LANES)
    lowest, span = reader.read_bytes(2)
    _require(1 <= precision <= 15 and lowest + span < 256, "a table of frequencies is damaged")
    frequencies = reader.read_bits(span + 1, precision).astype(np.uint32)
    _require(int(frequencies.sum()) == 1 << precision, "frequencies do not add up")
    states = reader.read_words(lanes, "<u4").copy()
    words = reader.read_words(reader.read_number(), "<u2").astype(np.uint32)
    symbol_of = np.repeat(np.arange(lowest, lowest + span + 1, dtype=np.uint8), frequencies)
    frequency_of = np.repeat(frequencies, frequencies)
    starts_of = np.repeat(np.cumsum(frequencies, dtype=np.uint32) - frequencies, frequencies)
    offset_of = np.arange(1 << precision, dtype=np.uint32) - starts_of
    symbols, mask, position = np.empty(count, np.uint8), np.uint32((1 << precision) - 1), 0
    for start in range(0, count, lanes):
        slots = states[: count - start] & mask
        symbols[start : start + lanes] = symbol_of[slots]
        state = frequency_of[slots] * (states[: count - start] >> precision) + offset_of[slots]
        empty = np.flatnonzero(state < LOWEST_STATE)
        if len(empty):
            _require(position + len(empty) <= len(words), "a stream has too few words")
            state[empty] = (state[empty] << 16) | words[position : position + len(empty)]
            position += len(empty)
        states[: len(state)] = state
    _require(position == len(words) and bool((states == LOWEST_STATE).all()), "a stream does not end where it must")
    return symbols


def _read_planes(reader: _Reader, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """Return numbers stored as one stream per byte; of floats, the sign is the lowest bit."""
    words = np.zeros(shape, f"<u{dtype.itemsize}")
    for plane in range(dtype.itemsize):
        words |= _read_symbols(reader, shape).astype(words.dtype) << (8 * plane)
    if dtype.kind == "f":
        words = (words >> 1) | (words << (8 * dtype.itemsize - 1))
    return words.view(dtype)


def _read_numbers(reader: _Reader, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """Return numbers with or without a mask of those that are not zero."""
    if not reader.read_bytes(1)[0]:
        return _read_planes(reader, shape, dtype)
    kept = _read_symbols(reader, shape) != 0
    array = np.zeros(shape, dtype)
    array[kept] = _read_planes(reader, (int(kept.sum()),), dtype)
    return array


def _read_tensor(reader: _Reader, coding: int, shape: tuple[int, ...], dtype: "np.dtype[Any]", limit: int) -> Array:
    """Return the values of one coded tensor."""
    rows, single = shape[0], np.dtype("f4")
    if coding == 1:
        return _read_numbers(reader, shape, dtype)
    if coding == 2:
        size, clusters = reader.read_number(), reader.read_number()
        _require(size > 0 < clusters <= 256, "a codebook has no rows, no clusters or too many")
        codebooks = -(-rows // size)
        _require(4 * codebooks * clusters <= limit, "codebooks are too large for the file")
        indices = _read_symbols(reader, shape).reshape(rows, -1)
        _require(int(indices.max()) < clusters, "an index lies outside of its codebook")
        centroids = _read_planes(reader, (codebooks, clusters), single)
        return centroids[(np.arange(rows) // size)[:, None], indices]
    if coding == 3:
        bits, size = reader.read_bytes(1)[0], reader.read_number()
        _require(1 <= bits & 0x7F <= 8 and size > 0, "a group has no bits or no weights")
        codes = _read_symbols(reader, shape).reshape(rows, -1).astype(single)
        groups = -(-codes.shape[1] // size)
        group_of = np.arange(codes.shape[1]) // size
        scales = _read_planes(reader, (rows, groups), single)
        zeros = _read_symbols(reader, (rows, groups))[:, group_of] if bits & 0x80 else 2.0 ** (bits - 1)
        return (codes - zeros) * scales[:, group_of]
    if coding == 4:
        scaled, form = divmod(reader.read_bytes(1)[0], 0x80)
        _require(form < 4, "a floating point format is unknown")
        values = _widen(_read_numbers(reader, shape, np.dtype("f2" if form < 2 else "u1")), form).reshape(rows, -1)
        return values * _read_planes(reader, (rows, 1), single) if scaled else values
    _require(coding == 5, f"a tensor is stored in the unknown way {coding}")
    bits, fraction = reader.read_bytes(2)
    words = _read_numbers(reader, shape, np.dtype("u1" if bits <= 8 else "<u2")).astype(np.int32)
    return ((words >> 1) ^ -(words & 1)).astype(single) * np.float32(2.0 ** -((fraction ^ 0x80) - 0x80))


def _widen(values: Array, form: int) -> Array:
    """Return fp16, bf16, fp8 e4m3 or fp8 e5m2 as float32."""
    if form == 0:
        return values.astype(np.float32)
    if form == 1:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    bits = values.astype(np.uint16)
    if form == 3:
        return (bits << 8).view(np.float16).astype(np.float32)
    # The bits of e4m3 are those of an fp16 that is 2 ** 8 times smaller, but for its only NaN.
    halves = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).view(np.float16)
    return np.where(bits & 0x7F == 0x7F, np.float32(np.nan), halves.astype(np.float32) * 256)


def _number(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _number(value >> 7)


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"the packed file is damaged: {otherwise}")


def main() -> int:
    """Run the sample input through one file, or through every model file there is."""
    directory = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Run the sample input through a model made by Pare.")
    parser.add_argument("--file", help="model.onnx, .packed, .pt2 or .aoti.pt2; default: every one that is here")
    parser.add_argument("--unpack", metavar="MODEL.onnx", help="write model.packed as an ordinary ONNX file, and stop")
    parser.add_argument("--device", default="cpu", help="where torch runs model.pt2, for example cuda; default: cpu")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a difference is above its tolerance")
    arguments = parser.parse_args()
    if arguments.unpack:
        verify_digest(directory / "model.packed")
        Path(arguments.unpack).write_bytes(unpack((directory / "model.packed").read_bytes()))
        return 0
    names = sorted(name for name in read_manifest(directory)["files"] if name.endswith((".onnx", ".packed", ".pt2")))
    here = [directory / name for name in names if (directory / name).exists()]
    paths = [directory / arguments.file] if arguments.file else here
    wrong = False
    if not paths:
        weights = load_weights(directory / "model.safetensors")
        print(f"model.safetensors: {len(weights)} arrays, digest as in the manifest; there is no model file to run")
    for path in paths:
        try:
            differences = compare_with_sample(path, arguments.device)
        except WrongMachine as reason:
            print(f"{path.name} cannot run here: {reason}", file=sys.stderr)
            wrong = True
            continue
        for output, (difference, tolerance) in differences.items():
            wrong = wrong or difference > tolerance
            print(f"{path.name}: output {output!r}: largest difference {difference:.3g} (tolerance {tolerance:.3g})")
    return 1 if arguments.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
