"""A compiled package: what it computes, what it is made of, where it is refused. One is compiled for the whole file."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor import cpp_builder

from app.recipes.plan import Plan
from app.recipes.recipe import FILES, Recipe, Target
from tests.engine.process import plan_of
from tests.engine.test_load import metrics
from tests.engine.tiny_model import SIGNATURE, TwoInputs, write_pt2
from tests.engine.zoo import ZOO, export_model
from worker.engine import load
from worker.engine.artifacts import choose_compiled_tolerance, write_artifacts
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.compilers import CompilerMissing
from worker.engine.environment import describe_machine
from worker.engine.errors import ExportFailed, ModelRejected
from worker.engine.measure.memory import measure_peak_memory
from worker.engine.measure.runtimes import open_model, runtime_of
from worker.engine.pipeline import optimize
from worker.engine.programs import export_aoti as module_under_test
from worker.engine.programs.export_aoti import export_aoti
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.progress import Reporter

NAME = FILES["aoti"]
TARGET = Target(runtime="aotinductor")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
# torch's own, of parts that its compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def open_tiny(directory: Path) -> Program:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_pt2(TwoInputs().eval(), directory / "upload.pt2")
    program = open_program(directory / "upload.pt2", directory)
    return replace(program, signature=replace(program.signature, outputs=SIGNATURE.outputs))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return open_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def made(tiny: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts around a compiled package."""
    directory = tmp_path_factory.mktemp("artifacts")
    seconds = export_aoti(tiny, tiny, directory / NAME, TARGET)
    assert seconds > 0
    inputs = tiny.example_inputs(4)
    samples = (
        {"x": inputs[0].numpy(), "file": inputs[1].numpy()},
        {"sum": tiny.module(*inputs)[0].detach().numpy()},
    )
    recipe = Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}], "target": {"runtime": "aotinductor"}})
    plan = Plan.model_validate(
        {"action": "optimize", "model": {"file": "m", "format": "pt2", "sha256": "0" * 64}, "recipe": recipe}
    )
    write_artifacts(plan, metrics(), SIGNATURE, samples, directory, integer=False)
    return directory


def run_alone(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run load.py isolated, where there is no compiler."""
    return subprocess.run(
        [sys.executable, "-I", str(directory / "load.py"), *arguments],
        cwd="/", env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_it_computes_what_the_module_does_at_every_batch(tiny: Program, made: Path, batch: int) -> None:
    inputs = tuple(torch.randn(batch, 3) for _ in range(2))
    assert runtime_of(made / NAME) == "aotinductor"
    arrays = tuple(each.numpy() for each in inputs)
    (found,) = open_model(made / NAME, "aotinductor", SIGNATURE, 1)(arrays)
    np.testing.assert_allclose(found.astype(np.float64), tiny.module(*inputs)[0].detach().numpy(), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_torch_opens_it_as_its_own(tiny: Program, made: Path) -> None:
    inputs = tiny.example_inputs(5)
    found = torch._inductor.aoti_load_package(str(made / NAME))(*inputs)
    torch.testing.assert_close(tuple(found), tuple(tiny.module(*inputs)))


@needs_compiler
def test_it_holds_what_loading_needs_and_no_text_of_the_compiler(made: Path) -> None:
    with zipfile.ZipFile(made / NAME) as archive:
        names = {name.removeprefix("model/") for name in archive.namelist()}
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    inside = {each.rpartition("/")[2].partition(".")[2] for each in names if each.startswith("data/")}
    assert inside == {"wrapper.so", "wrapper_metadata.json", "kernel_metadata.json"}
    assert not any(name.endswith((".cpp", "serialization_id")) for name in names)


@needs_compiler
def test_load_runs_it_without_pare_and_without_a_compiler(made: Path) -> None:
    done = run_alone(made, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{NAME}: output 'sum': largest difference")


@needs_compiler
def test_what_the_model_does_not_take_is_refused_and_not_read_past_its_end(made: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(made)!r}); import load, numpy as np\n"
        f"predict = load.load({str(made / NAME)!r})\n"
        "for x in (np.zeros((4, 2), 'f4'), np.zeros((4, 3), 'f8'), np.zeros((4,), 'f4')):\n"
        "    try: predict({'x': x, 'file': x})\n"
        "    except RuntimeError as error: print('refused', error)\n"
        "one = np.ones((1, 3), 'f4')\n"
        "print('taken', predict({'x': one, 'file': one})['sum'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-IB", "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.count("refused") == 3, done.stdout
    assert "taken (1, 2)" in done.stdout


@needs_compiler
def test_the_manifest_says_what_it_was_compiled_for(made: Path) -> None:
    facts = json.loads((made / "manifest.json").read_text())["compiled"][NAME]
    tolerances = facts.pop("tolerances")
    assert tolerances == json.loads((made / "manifest.json").read_text())["tolerances"]
    assert facts == json.loads(json.dumps(describe_machine(TARGET)))
    assert (facts["device"], facts["torch"]) == ("cpu", str(torch.__version__))
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_eight_bits_may_round_otherwise_as_far_as_they_round_at_all() -> None:
    output, near, far = (np.array([1.0, each], np.float32) for each in (0.0, 0.001, 0.25))
    assert choose_compiled_tolerance(output, None) == pytest.approx(0.001)
    assert choose_compiled_tolerance(output, near) == pytest.approx(0.05)
    assert choose_compiled_tolerance(output, far) == pytest.approx(0.5)


@needs_compiler
def test_another_machine_is_told_why_not(made: Path, tmp_path: Path) -> None:
    for path in made.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["compiled"][NAME]["instruction_sets"].append("avx4096")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = run_alone(tmp_path, "--check")
    assert done.returncode == 1
    assert f"{NAME} cannot run here: it was compiled for a processor with avx4096" in done.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"torch": "2.99.0+cpu"}, "compiled for torch 2.99.0, and this is torch"),
        ({"machine": "z80"}, "z80, and this is"),
        ({"device": "cuda", "compute_capability": "9.9"}, "compiled for"),
        ({"instruction_sets": ["sse", "avx4096"]}, "a processor with avx4096, which"),
    ],
)
def test_every_difference_that_matters_has_its_words(change: dict[str, Any], expected: str) -> None:
    facts = describe_machine(TARGET)
    load._check_machine(facts)
    with pytest.raises(load.WrongMachine, match=expected):
        load._check_machine({**facts, **change})


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(load.WrongMachine, match=r"needs torch 2\.13\.0, and there is none: pip install torch"):
        load._load_compiled(tmp_path / NAME, [], [], {"torch": "2.13.0"})


@needs_compiler
def test_its_memory_is_measured(made: Path, tmp_path: Path) -> None:
    arrays = (np.zeros((4, 3), np.float32),) * 2
    peak = measure_peak_memory(made / NAME, "aotinductor", SIGNATURE, arrays, 1, tmp_path)
    assert 0 < peak.host_bytes < 200 * 2**20


@needs_compiler
def test_nobody_uploads_one(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="compiled code") as caught:
        open_program(made / NAME, tmp_path)
    assert caught.value.code == "native_code"


def test_without_a_compiler_a_job_ends_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cpp_builder.cpp_compiler_search.cache_clear()
    model = {"file": "missing.pt2", "format": "pt2", "sha256": "0" * 64}
    for recipe in ({"target": {"runtime": "aotinductor"}}, {"outputs": {"formats": ["aoti"]}}):
        plan = plan_of("optimize", model=model, recipe={"steps": [{"kind": "prune_magnitude"}], **recipe})
        with pytest.raises(CompilerMissing, match=r"no C\+\+ compiler") as caught:
            optimize(plan, tmp_path, Reporter(lambda _: None), StopRequest())
        assert (caught.value.code, caught.value.retryable) == ("compiler_missing", True)
        assert "aoti" in caught.value.detail
        assert "g++" in caught.value.fix


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (NotImplementedError("this operator"), ExportFailed),
        (RuntimeError("cc1plus: out of memory allocating 65536 bytes"), MemoryError),
    ],
)
def test_a_failed_compilation_says_what_to_do(
    tiny: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception, expected: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(expected) as caught:
        export_aoti(tiny, tiny, tmp_path / NAME, TARGET)
    if isinstance(caught.value, ExportFailed):
        assert caught.value.code == "compilation_failed"
        assert "this operator" in caught.value.detail
        assert "target.runtime to 'torch'" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_package_that_computes_something_else_is_no_artifact(
    tiny: Program, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tiny.copy()
    with torch.no_grad():
        next(other.module.parameters()).add_(0.1)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: None)
    monkeypatch.setattr(module_under_test, "_repack", lambda _, path: shutil.copyfile(made / NAME, path))
    with pytest.raises(ExportFailed, match=r"output 'sum' differs by .* at batch 1") as caught:
        export_aoti(other, other, tmp_path / NAME, TARGET)
    assert caught.value.code == "compiled_differs"


@pytest.mark.long
@needs_compiler
def test_models_that_differ_in_sizes_alone_do_not_share_code(tmp_path: Path) -> None:
    # Each is compared with its program when it is written.
    for width in (8, 5):
        torch.manual_seed(width)
        module = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
        place = tmp_path / str(width)
        place.mkdir()
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(
            torch.export.export(module.eval(), (torch.zeros(4, 3),), dynamic_shapes=shapes), place / "upload.pt2"
        )
        program = open_program(place / "upload.pt2", place)
        export_aoti(program, program, place / NAME, TARGET)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("name", ZOO)
def test_every_family_compiles(name: str, tmp_path: Path) -> None:
    """What was compiled is compared with its program at two batches by export_aoti itself."""
    torch.set_num_threads(1)
    export_model(name, tmp_path / "upload.pt2")
    program = open_program(tmp_path / "upload.pt2", tmp_path)
    export_aoti(program, program, tmp_path / NAME, TARGET)
    predict = open_model(tmp_path / NAME, "aotinductor", program.signature, 1)
    inputs = program.example_inputs(5, seed=3)
    with torch.no_grad():
        expected = program.module.eval()(*inputs)
    for one, other in zip(predict(tuple(each.numpy() for each in inputs)), expected, strict=True):
        assert load.largest_difference(other.numpy(), one) <= choose_compiled_tolerance(other.numpy(), None)
