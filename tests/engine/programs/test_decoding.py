"""Files for torch that store codes: decoded bit by bit to the encoding's numbers, small on disk and in memory."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

from app.recipes.recipe import Format, Target
from tests.engine.simulated_device import DEVICE, simulated_device
from tests.engine.techniques.opening import open_module
from worker.engine.errors import ExportFailed
from worker.engine.measure.macs import count_macs
from worker.engine.measure.memory import measure_peak_memory
from worker.engine.measure.runtimes import open_model
from worker.engine.packing.encodings import FLOAT_TYPES, Codebook, Encoding, FixedPoint, Grouped
from worker.engine.programs.decoding.weights import make_coded
from worker.engine.programs.export import export
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.quantization.precisions import count_bytes
from worker.engine.quantization.rounding import round_to_fixed, round_to_float, round_to_groups
from worker.engine.quantization.weights import find_weights
from worker.engine.sharing.codebooks import share

IN_TORCH = Target(runtime="torch")
SHAPES = some.one_of(
    some.tuples(some.integers(1, 7), some.integers(1, 70)),
    some.tuples(some.integers(1, 5), some.integers(1, 6), some.integers(1, 4), some.integers(1, 3)),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_codes(shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def check(encoding: Encoding) -> int:
    """Compare all of a weight, and some of its rows, with the encoding's numbers; return the bytes of its buffers."""
    coded, wanted = make_coded(encoding), encoding.decode()
    assert coded().view(torch.int32).equal(wanted.view(torch.int32))
    rows = torch.tensor([[0, len(wanted) - 1, 0]])
    assert coded(rows).view(torch.int32).equal(wanted[rows].view(torch.int32))
    # Whatever a call does in place, the codes stay what they are.
    assert coded().view(torch.int32).equal(wanted.view(torch.int32))
    return sum(each.nbytes for each in coded.buffers())


@given(SHAPES, some.integers(2, 8), some.integers(1, 80), some.booleans(), some.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_groups_are_decoded_exactly(
    shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape).numel() // shape[0]
    groups = -(-columns // group_size)
    encoding = Grouped(
        codes=random_codes((rows, columns), bits, seed),
        scales=torch.randn(rows, groups),
        zero_points=None if symmetric else random_codes((rows, groups), bits, seed + 1),
        bits=bits,
        group_size=group_size,
        shape=shape,
    )
    # A row ends where a byte ends, once for each part of a code, and its last group is filled up; LIFTS are 8 bytes.
    padded = columns if groups == 1 else groups * group_size
    codes, zeros = padded * bits / 8 + 3, 0 if symmetric else groups * bits / 8 + 3
    assert check(encoding) <= rows * (codes + zeros + 4 * groups) + 16


@given(SHAPES, some.integers(2, 16), some.integers(-32, 47), some.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_fixed_point_numbers_are_decoded_exactly(shape: tuple[int, ...], bits: int, fraction: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int16)
    num_bytes = check(FixedPoint(codes, bits, fraction))
    assert num_bytes <= (codes.numel() * bits / 8 + 3 * shape[0] + 8 if bits <= 8 else 2 * codes.numel())


@given(SHAPES, some.sampled_from(list(FLOAT_TYPES)), some.floats(1e-20, 1e20), some.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_floats_are_decoded_exactly(shape: tuple[int, ...], form: str, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    encoding = round_to_float(torch.randn(shape) * size, form)  # type: ignore[arg-type]
    width = 2 if form in ("fp16", "bf16") else 1
    assert check(encoding) == width * encoding.values.numel() + (0 if encoding.scales is None else 4 * shape[0])


@pytest.mark.parametrize("form", ["fp8_e4m3", "fp8_e5m2"])
def test_every_8_bit_float_is_decoded_exactly(form: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT_TYPES[form])  # type: ignore[index]
    finite = every[torch.isfinite(every.float())]
    check(replace(round_to_float(torch.ones(1, 1), form), values=finite[:, None], scales=None))  # type: ignore[arg-type]


@given(SHAPES, some.integers(1, 256), some.integers(1, 9), some.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codebooks_are_decoded_exactly(
    shape: tuple[int, ...], clusters: int, rows_per_codebook: int, seed: int
) -> None:
    torch.manual_seed(seed)
    books = -(-shape[0] // rows_per_codebook)
    indices = torch.randint(0, clusters, shape, dtype=torch.uint8)
    check(Codebook(indices, torch.randn(books, clusters), rows_per_codebook))


class Everything(nn.Module):
    """Each kind of layer that can be coded; the table is also the output layer, and is read besides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 24)
        self.convolution = nn.Conv1d(24, 18, 3, padding=1, stride=2, groups=2)
        self.lstm = nn.LSTM(18, 20, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(40, 24)
        self.rnn = nn.RNN(24, 24, nonlinearity="relu", bias=False)
        self.up = nn.ConvTranspose1d(24, 24, 3, stride=2, output_padding=1, padding=1)
        self.image = nn.Conv2d(1, 3, 3, padding="same", dilation=2)
        self.output = nn.Linear(24, 96, bias=False)
        self.output.weight = self.table.weight
        self.head = nn.Linear(96, 5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convolution(self.table(tokens).transpose(1, 2)).permute(2, 0, 1)
        x, (h, _) = self.lstm(x.transpose(0, 1))
        x, _ = self.gru(x.transpose(0, 1))
        x = self.up(self.rnn(x)[0].permute(1, 2, 0)).transpose(1, 2)
        x = self.image(x.unsqueeze(1)).mean(1)
        return self.head(self.output(x)), self.table.weight.sum() + h.sum(0)


CODERS: dict[str, Callable[[Tensor], Encoding]] = {
    "int4": lambda weight: round_to_groups(weight, 4, 16, symmetric=False),
    "int3": lambda weight: round_to_groups(weight, 3, 32, symmetric=True),
    "fp8": lambda weight: round_to_float(weight, "fp8_e4m3"),
    "bf16": lambda weight: round_to_float(weight, "bf16"),
    "fixed": lambda weight: round_to_fixed(weight, 7, None),
    "codebook": lambda weight: share(weight, 16, 5, "linear", 3),
}


def encode(program: Program, *coders: str) -> None:
    """Code every weight, in turn by each of the coders."""
    for index, weight in enumerate(find_weights(program, embeddings=True).chosen):
        program.encode(weight.name, CODERS[coders[index % len(coders)]](weight.parameter.detach()))


def write(program: Program, directory: Path, form: Format = "pt2") -> tuple[Path, Path]:
    """Write a program for each runtime: as floats, and as codes."""
    paths = directory / f"floats.{form}", directory / f"codes.{form}"
    export(program, program, form, paths[0], Target())
    export(program, program, form, paths[1], IN_TORCH)
    return paths


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path, Path]:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("everything")
    with warnings.catch_warnings():
        # The exporter's, about recurrent layers.
        warnings.simplefilter("ignore")
        program = open_module(Everything(), (torch.randint(0, 96, (4, 8)),), directory)
    encode(program, *CODERS)
    return program, *write(program, directory)


def test_a_file_of_codes_gives_the_outputs_of_the_file_of_floats(everything: tuple[Program, Path, Path]) -> None:
    _, floats, codes = everything
    one, other = (torch.export.load(path).module() for path in (floats, codes))
    with torch.inference_mode():
        for batch in (1, 5):
            tokens = torch.randint(0, 96, (batch, 8))
            # Equal numbers, but sums of floats follow how they lie in memory.
            torch.testing.assert_close(tuple(other(tokens)), tuple(one(tokens)), rtol=1e-5, atol=1e-5)


def test_weights_are_stored_as_codes_and_shared_ones_once(everything: tuple[Program, Path, Path]) -> None:
    program, _, codes = everything
    exported = torch.export.load(codes)
    state = exported.state_dict
    coded = sum(count_bytes(each) for each in program.encodings.values() if not isinstance(each, Codebook))
    matrices = [each for name, each in state.items() if each.dtype == torch.float32 and "scales" not in name]
    assert max(each.numel() for each in matrices) <= 256, "biases and codebooks"
    stored = {each.untyped_storage().data_ptr(): each.nbytes for each in state.values()}
    num_books = sum(isinstance(each, Codebook) for each in program.encodings.values())
    assert num_books
    rest = sum(each.nbytes for each in matrices) + 2000 * num_books
    assert sum(stored.values()) < 1.1 * coded + rest
    parts = {name.partition(".weight.")[2] for name in state if name.startswith("table.weight.")}
    assert parts == {"codes.bits_4", "scales", "zero_points.bits_4"}
    for part in parts:
        one, other = state[f"table.weight.{part}"], state[f"output.weight.{part}"]
        assert one.data_ptr() == other.data_ptr()
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(each.startswith("aten.") or "built-in" in each for each in operators)


def test_a_file_of_codes_can_be_uploaded_again(everything: tuple[Program, Path, Path], tmp_path: Path) -> None:
    program, floats, codes = everything
    again = open_program(codes, tmp_path)
    tokens = torch.randint(0, 96, (3, 8))
    with torch.inference_mode():
        expected, found = torch.export.load(floats).module()(tokens), again.module.eval()(tokens)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-5)
    before, after = count_macs(program), count_macs(again)
    assert after.total == before.total - sum(before.by_layer[name] for name in ("lstm", "gru", "rnn"))
    assert after.uncounted == ("aten.gru.input", "aten.lstm.input", "aten.rnn_relu.input")
    assert not find_weights(again, embeddings=True).chosen


def test_a_file_of_codes_mixes_no_devices(everything: tuple[Program, Path, Path]) -> None:
    module = torch.export.load(everything[2]).module()
    tokens = torch.randint(0, 96, (2, 8))
    with torch.inference_mode():
        expected = module(tokens)
    with simulated_device() as simulated:
        there = module.to(DEVICE)
        with torch.inference_mode():
            made = there(tokens.to(DEVICE))
        assert simulated.num_operators > 50
        assert made[0].device == DEVICE
        torch.testing.assert_close(made[0].to("cpu"), expected[0])


@pytest.mark.parametrize("coder", CODERS)
def test_pruned_weights_stay_zero_and_every_file_is_smaller(coder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = open_module(nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 50)), (torch.randn(4, 200),), tmp_path)
    mask = torch.rand(300, 200) > 0.5
    with torch.no_grad():
        program.module.get_parameter("0.weight").mul_(mask)
    encode(program, coder)
    weight = make_coded(program.encodings["0.weight"])()
    assert int(torch.count_nonzero(weight[~mask])) == 0
    assert int(torch.count_nonzero(weight)) > 0.7 * int(mask.sum())
    forms: tuple[Format, ...] = ("pt2", "safetensors")
    for form in forms:
        before, after = (path.stat().st_size for path in write(program, tmp_path, form))
        assert after < (0.6 if coder == "bf16" else 0.45) * before
    again = tmp_path / "again.pt2"
    export(program, program, "pt2", again, IN_TORCH)
    assert again.read_bytes() == (tmp_path / "codes.pt2").read_bytes()


@pytest.mark.parametrize(("coder", "fails"), [("int4", False), ("int3", True), ("fp8", True)])
def test_as_onnx_it_is_right_or_refused(coder: str, fails: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = open_module(nn.Sequential(nn.Linear(64, 40)), (torch.randn(4, 64),), tmp_path)
    encode(program, coder)
    again = open_program(write(program, tmp_path)[1], tmp_path / "work")
    path, x = tmp_path / "model.onnx", torch.randn(3, 64)
    if fails:
        with pytest.raises(ExportFailed) as caught:
            export_onnx(again, path)
        assert caught.value.code == "onnx_export_failed"
        return
    export_onnx(again, path)
    (found,) = open_model(path, "onnxruntime", again.signature, 1)((x.numpy(),))
    torch.testing.assert_close(torch.from_numpy(found), program.module(x)[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_memory_holds_codes_and_one_layer_of_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    program = open_module(layers, (torch.randn(4, 2048),), tmp_path)
    encode(program, "int4")
    inputs = (torch.randn(1, 2048).numpy(),)
    floats, codes = (
        measure_peak_memory(path, "torch", program.signature, inputs, 1, tmp_path).host_bytes
        for path in write(program, tmp_path)
    )
    # 8 layers of 16 MiB become 8 of 2.5 MiB; while one is decoded there are 16 MiB of floats and its unpacked codes.
    assert floats - codes > 45 * 2**20
