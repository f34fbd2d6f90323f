"""Compiled training ends where training does; it is refused without a compiler, and where it could not work."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import cpp_builder

from app.recipes.pruning import PruneMagnitude
from app.recipes.recipe import KINDS
from app.recipes.training import Finetune, TrainingSettings
from tests.engine.parallel.runs import difference
from tests.engine.techniques.learning import context, open_gpt, open_pruned_cnn
from worker.engine import compilers
from worker.engine.compilers import CompilerMissing
from worker.engine.devices import CPU
from worker.engine.failures import translate_failure
from worker.engine.programs.program import Program
from worker.engine.quantization.fake_quantization import simulate
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training import compiling, loop
from worker.engine.training.examples import BoundExamples

COMMON: dict[str, Any] = {
    "batch_size": 50, "max_steps": 4, "learning_rate": 0.01, "optimizer": "sgd", "keep_best": False,
}  # fmt: skip
TOLERANCE = 1e-4
"""Of every tensor's norm, after a few steps: fused kernels round at other places."""
World = tuple[Program, BoundExamples]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
# torch's own, of parts that its compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _one_thread_and_nothing_compiled_before() -> None:
    torch.set_num_threads(1)
    torch.compiler.reset()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Translate graphs and derivatives as ever, and then run them with torch's own kernels, which takes no time."""
    modules: list[nn.Module] = []
    real = torch.compile

    def compile_quickly(module: nn.Module, *, options: dict[str, Any]) -> Any:
        assert options == compiling.OPTIONS
        modules.append(module)
        return real(module, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    return modules


def run(world: World, kind: str, **spec: Any) -> Program:
    program, examples = world
    teacher = program.copy()
    step = KINDS[kind].model_validate({"kind": kind, **COMMON, **spec})
    outcome = TECHNIQUES[kind].run(program, step, context(examples, teacher))
    assert isinstance(outcome.program, Program)
    return outcome.program


CASES: dict[str, tuple[Callable[[Path], World], str, dict[str, Any]]] = {
    "pruned convolutions in uneven parts": (open_pruned_cnn, "finetune", {"accumulate": 3, "gradient_clip_norm": 0.1}),
    "tied weights and dropout": (open_gpt, "finetune", {"batch_size": 24}),
    "features of a teacher": (open_pruned_cnn, "distill", {"hidden_weight": 1.0, "attention_weight": 1.0}),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_compiled_training_ends_where_training_does(case: str, compiled: list[nn.Module], tmp_path: Path) -> None:
    make, kind, spec = CASES[case]
    start = make(tmp_path)[0]

    plain, fused = (run(make(tmp_path), kind, **spec, compile=flag) for flag in (False, True))

    assert len(compiled) == 1
    assert difference(plain, fused) < TOLERANCE < difference(start, fused)
    assert list(fused.module.state_dict()) == list(start.module.state_dict())
    assert not any(fused.module.get_parameter(name)[~mask].any() for name, mask in fused.masks.items())


@needs_compiler
def test_so_does_simulated_rounding(compiled: list[nn.Module], tmp_path: Path) -> None:
    made = []
    for flag in (False, True):
        program, examples = open_pruned_cnn(tmp_path)
        settings = TrainingSettings.model_validate({**COMMON, "compile": flag})
        module = simulate(program.module, (), bits=8, per_channel=True)
        loop.train(program, examples, settings, seed=0, report=lambda *_, **__: None, module=module)
        made.append({name: each.clone() for name, each in module.state_dict().items()})
    assert len(compiled) == 1
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_the_step_is_refused_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cpp_builder.cpp_compiler_search.cache_clear()
    program, examples = open_pruned_cnn(tmp_path)
    before = {name: each.clone() for name, each in program.module.state_dict().items()}
    with pytest.raises(CompilerMissing, match="no C\\+\\+ compiler") as caught:
        run((program, examples), "finetune", compile=True)
    assert (caught.value.code, caught.value.retryable) == ("compiler_missing", True)
    assert "g++" in caught.value.fix
    assert all(torch.equal(each, before[name]) for name, each in program.module.state_dict().items())


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(compilers, "has_triton", lambda: False)
    with pytest.raises(CompilerMissing, match="no Triton") as no_triton:
        compilers.check_compiler(gpu, "compile is true", "leave it out")
    monkeypatch.setattr(compilers, "has_triton", lambda: True)
    (tmp_path / "cc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    compilers.check_compiler(gpu, "compile is true", "leave it out")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CompilerMissing, match="no C compiler") as no_c:
        compilers.check_compiler(gpu, "compile is true", "leave it out")
    assert "CUDA build" in no_triton.value.fix
    assert "(gcc)" in no_c.value.fix


@needs_compiler
def test_a_failed_compilation_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> Any:
        raise NotImplementedError("this operator")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options: real(module, backend=fail))  # noqa: ARG005
    with pytest.raises(BackendCompilerFailed) as caught:
        run(open_pruned_cnn(tmp_path), "finetune", compile=True)
    error = translate_failure(caught.value, "finetune")
    assert error.code == "compilation_failed"
    assert "this operator" in error.detail
    assert "compile to false" in error.fix


@needs_compiler
def test_what_the_model_itself_raises_is_no_failed_compilation(compiled: list[nn.Module], tmp_path: Path) -> None:
    def loss(_outputs: tuple[Tensor, ...], _seen: object) -> Tensor:
        raise KeyError("of the loss")

    program, examples = open_pruned_cnn(tmp_path)
    settings = TrainingSettings.model_validate({**COMMON, "compile": True})
    with pytest.raises(KeyError, match="of the loss"):
        loop.train(program, examples, settings, seed=0, report=lambda *_, **__: None, loss=loss)
    assert compiled


def test_it_goes_with_one_process_and_with_steps_that_only_train() -> None:
    with pytest.raises(ValidationError, match="compile goes with one process, not with data 2"):
        Finetune.model_validate({"kind": "finetune", "compile": True, "parallel": {"data": 2}})
    assert Finetune.model_validate({"kind": "finetune", "compile": True, "parallel": {"data": 1}}).compile
    gradual = {"kind": "prune_magnitude", "schedule": "linear", "num_iterations": 3}
    with pytest.raises(ValidationError, match=r"training\.compile"):
        PruneMagnitude.model_validate({**gradual, "training": {"compile": True}})
    assert PruneMagnitude.model_validate({**gradual, "training": {"compile": False}}).training is not None


@needs_compiler
def test_the_module_is_not_wrapped() -> None:
    module = nn.Linear(2, 2)
    call = compiling.compile_module(module, CPU)
    assert call is not module
    assert list(module.state_dict()) == ["weight", "bias"]
    assert "forward" not in vars(module)
