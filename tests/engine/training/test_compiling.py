"""Compiled training ends where training does; it is refused without a compiler, and where it could not work."""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
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
from tests.engine.techniques.learning import context, digit_examples, make_cnn, make_zoo, random_examples
from worker.engine.devices import CPU
from worker.engine.failures import translate_failure
from worker.engine.programs.program import Program
from worker.engine.quantization.fake_quantization import simulate
from worker.engine.techniques.registry import TECHNIQUES
from worker.engine.training import compiling, loop
from worker.engine.training.compiling import CompilerMissing
from worker.engine.training.examples import BoundExamples

COMMON: dict[str, Any] = {
    "batch_size": 50, "max_steps": 4, "learning_rate": 0.01, "optimizer": "sgd", "keep_best": False,
}  # fmt: skip
TOLERANCE = 1e-4
"""Of every tensor's norm, after a few steps: fused kernels round at other places."""
World = tuple[Program, BoundExamples]
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


def open_cnn() -> World:
    program = make_cnn(4)
    program.masks["convs.1.weight"] = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    program.apply_masks()
    return program, digit_examples(program, Path(mkdtemp()))


def open_gpt() -> World:
    program = make_zoo("gpt")
    return program, random_examples(program, Path(mkdtemp()), task="language_modeling")


def run(world: World, kind: str, **spec: Any) -> Program:
    program, examples = world
    teacher = program.copy()
    step = KINDS[kind].model_validate({"kind": kind, **COMMON, **spec})
    outcome = TECHNIQUES[kind].run(program, step, context(examples, teacher))
    assert isinstance(outcome.program, Program)
    return outcome.program


CASES: dict[str, tuple[Callable[[], World], str, dict[str, Any]]] = {
    "pruned convolutions in uneven parts": (open_cnn, "finetune", {"accumulate": 3, "gradient_clip_norm": 0.1}),
    "tied weights and dropout": (open_gpt, "finetune", {"batch_size": 24}),
    "features of a teacher": (open_cnn, "distill", {"hidden_weight": 1.0, "attention_weight": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_training_ends_where_training_does(case: str, compiled: list[nn.Module]) -> None:
    make, kind, spec = CASES[case]
    start = make()[0]

    plain, fused = (run(make(), kind, **spec, compile=flag) for flag in (False, True))

    assert len(compiled) == 1
    assert difference(plain, fused) < TOLERANCE < difference(start, fused)
    assert list(fused.module.state_dict()) == list(start.module.state_dict())
    assert not any(fused.module.get_parameter(name)[~mask].any() for name, mask in fused.masks.items())


def test_so_does_simulated_rounding(compiled: list[nn.Module]) -> None:
    made = []
    for flag in (False, True):
        program, examples = open_cnn()
        settings = TrainingSettings.model_validate({**COMMON, "compile": flag})
        module = simulate(program.module, (), bits=8, per_channel=True)
        loop.train(program, examples, settings, seed=0, report=lambda *_, **__: None, module=module)
        made.append({name: each.clone() for name, each in module.state_dict().items()})
    assert len(compiled) == 1
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_the_step_is_refused_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cpp_builder.cpp_compiler_search.cache_clear()
    program, examples = open_cnn()
    before = {name: each.clone() for name, each in program.module.state_dict().items()}
    with pytest.raises(CompilerMissing, match="no C\\+\\+ compiler") as caught:
        run((program, examples), "finetune", compile=True)
    assert (caught.value.code, caught.value.retryable) == ("compiler_missing", True)
    assert "g++" in caught.value.fix
    assert all(torch.equal(each, before[name]) for name, each in program.module.state_dict().items())


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    with pytest.raises(CompilerMissing, match="no Triton") as no_triton:
        compiling.check_compiler(gpu)
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    compiling.check_compiler(gpu)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CompilerMissing, match="no C compiler") as no_c:
        compiling.check_compiler(gpu)
    assert "CUDA build" in no_triton.value.fix
    assert "(gcc)" in no_c.value.fix


def test_a_failed_compilation_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise NotImplementedError("this operator")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options: real(module, backend=fail))  # noqa: ARG005
    with pytest.raises(BackendCompilerFailed) as caught:
        run(open_cnn(), "finetune", compile=True)
    error = translate_failure(caught.value, "finetune")
    assert error.code == "compilation_failed"
    assert "this operator" in error.detail
    assert "compile to false" in error.fix


def test_what_the_model_itself_raises_is_no_failed_compilation(compiled: list[nn.Module]) -> None:
    def loss(_outputs: tuple[Tensor, ...], _seen: object) -> Tensor:
        raise KeyError("of the loss")

    program, examples = open_cnn()
    settings = TrainingSettings.model_validate({**COMMON, "compile": True})
    with pytest.raises(KeyError, match="of the loss"):
        loop.train(program, examples, settings, seed=0, report=lambda *_, **__: None, loss=loss)
    assert compiled


def test_it_goes_with_one_process_and_with_steps_that_only_train() -> None:
    with pytest.raises(ValidationError, match="compile goes with one process, not with data 2"):
        Finetune.model_validate({"kind": "finetune", "compile": True, "parallel": {"data": 2}})
    assert Finetune.model_validate({"kind": "finetune", "compile": True, "parallel": {"data": 1}}).compile
    with pytest.raises(ValidationError):
        PruneMagnitude.model_validate({"kind": "prune_magnitude", "sparsity": 0.5, "training": {"compile": True}})


def test_the_module_is_not_wrapped() -> None:
    module = nn.Linear(2, 2)
    call = compiling.compile_module(module, CPU)
    assert call is not module
    assert list(module.state_dict()) == ["weight", "bias"]
    assert "forward" not in vars(module)
