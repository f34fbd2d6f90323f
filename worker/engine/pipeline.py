"""The action `optimize`: open the model, keep its baseline, run the steps, export, measure both, write artifacts."""

import tempfile
from functools import partial
from pathlib import Path

import torch

from app.recipes.base import Form
from app.recipes.distillation import Distill
from app.recipes.metrics import Metrics
from app.recipes.plan import EngineResult, Plan
from app.recipes.recipe import FILES, RUNTIME_FORMATS, Recipe, Target
from worker.engine.artifacts import write_artifacts
from worker.engine.checkpoints.keeper import Checkpoints
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.devices import choose_device, prepare_device
from worker.engine.environment import describe_environment
from worker.engine.measure.compare import compare_layers
from worker.engine.measure.inputs import choose_batch, choose_inputs, make_sample
from worker.engine.measure.macs import count_macs
from worker.engine.measure.pair import Subject, measure_pair
from worker.engine.measure.runtimes import SUFFIXES
from worker.engine.measure.size import count_nonzero_by_layer, count_parameters
from worker.engine.measure.verdict import judge
from worker.engine.programs.describe import describe
from worker.engine.programs.export import export
from worker.engine.programs.export_aoti import check_aoti
from worker.engine.programs.intake import open_program
from worker.engine.programs.lowering.integers import find_integer_layers
from worker.engine.programs.program import FileProgram, Program
from worker.engine.progress import Reporter, Stage
from worker.engine.steps import expect_steps, run_steps
from worker.engine.training.accumulation import split_batches
from worker.engine.training.examples import BoundExamples, open_examples

COMPILING = 20.0
"""Weight of compiling a model in the progress of a job; opening it has 3."""


def optimize(plan: Plan, directory: Path, reporter: Reporter, stop: StopRequest) -> EngineResult:
    """Run the recipe of the plan on its model and return the metrics and the artifacts."""
    assert plan.model is not None
    assert plan.recipe is not None
    recipe = split_batches(plan.recipe, plan.split_batches)
    compiling = COMPILING if recipe.compiles else 0.0
    reporter.expect(
        [
            Stage("open_model", 3.0),
            Stage("baseline", 4.0 + compiling),
            *expect_steps(recipe),
            Stage("export", 4.0 + compiling),
            Stage("measure", 8.0),
            Stage("artifacts", 1.0),
        ]
    )
    device = choose_device(recipe.target.device)
    prepare_device(device)
    if recipe.compiles:
        check_aoti(recipe.target)
    scratch = directory / "tmp"
    reporter.enter("open_model")
    program = open_program(directory / "in" / plan.model.file, scratch, plan.model.format, plan.model.architecture)
    program.device = device
    signature = program.signature
    batch_size, notes = choose_batch(signature, recipe.target)
    examples = _open_examples(plan, program, directory)

    reporter.enter("baseline")
    layers = describe(program, ()).layers
    original = _write_subject(program, program, recipe.target, scratch / "original", reporter)

    untouched = program.copy() if _needs_original(recipe) else None
    made = run_steps(
        recipe,
        program,
        examples,
        num_threads=plan.num_threads,
        directory=scratch,
        reporter=reporter,
        open_original=None if untouched is None else untouched.copy,
        open_teacher=partial(_open_teacher, plan, directory),
        checkpoints=None if plan.checkpoint_seconds is None else Checkpoints(plan, directory, reporter, stop),
    )

    reporter.enter("export")
    artifacts = directory / "out" / "artifacts"
    artifacts.mkdir(parents=True)
    for index, form in enumerate(recipe.formats):
        reporter.report(index / len(recipe.formats), FILES[form])
        export(made.program, made.module, form, artifacts / FILES[form], recipe.target, reporter.note)
    result = _write_subject(made.program, made.module, recipe.target, scratch / "result", reporter, artifacts)

    reporter.enter("measure")
    inputs = choose_inputs(made.module, examples, batch_size, recipe.seed)
    pair = measure_pair(
        original,
        result,
        signature,
        recipe.target,
        inputs,
        examples,
        seed=recipe.seed,
        directory=scratch,
        report=reporter.report,
    )
    torch.set_num_threads(plan.num_threads)
    metrics = Metrics(
        baseline=pair.baseline,
        result=pair.result,
        comparison=pair.comparison,
        steps=tuple(made.record.steps),
        layers=compare_layers(layers, describe(made.module, ()).layers, count_nonzero_by_layer(made.module)),
        sensitivity=tuple(made.record.sensitivity),
        verdict=judge(
            pair.baseline,
            pair.result,
            pair.comparison,
            quality_change_error=pair.quality_change_error,
            quality_output=pair.quality_output,
            warnings=(*made.record.warnings, *notes, *_tell_split(plan)),
        ),
        environment=describe_environment(plan, device),
    )

    reporter.note(f"  {metrics.verdict.summary}")

    reporter.enter("artifacts")
    samples = make_sample(made.program, inputs[0])
    integer = recipe.form is Form.INTEGER or ("onnx" in recipe.formats and bool(find_integer_layers(made.module)))
    compiled_integers = recipe.compiles and isinstance(made.program, FileProgram)
    floats = make_sample(made.module, inputs[0])[1] if compiled_integers else None
    files = write_artifacts(plan, metrics, signature, samples, artifacts, integer=integer, floats=floats)
    return EngineResult(metrics=metrics, artifacts=files)


def _open_examples(plan: Plan, program: Program, directory: Path) -> BoundExamples | None:
    assert plan.recipe is not None
    if plan.recipe.data is None:
        return None
    files = {each.id: (directory / "in" / each.file, each.format) for each in plan.datasets}
    unpacked = directory / "tmp" / "examples"
    unpacked.mkdir()
    return open_examples(plan.recipe.data, files, program.signature, plan.recipe.seed, unpacked, program.tokenizer)


def _tell_split(plan: Plan) -> tuple[str, ...]:
    if plan.split_batches == 1:
        return ()
    return (
        f"Memory ran out in training, so each batch was taken in {plan.split_batches} times as many parts as the "
        "recipe says (accumulate): the same steps, but for batch norms, which saw one part at a time.",
    )


def _needs_original(recipe: Recipe) -> bool:
    return any(isinstance(step, Distill) and step.teacher_model_id is None for step in recipe.steps)


def _open_teacher(plan: Plan, directory: Path, model_id: str) -> Program:
    teacher = next(each for each in plan.teachers if each.id == model_id)
    # A place of its own: the ranks of a parallel step open it at the same time.
    scratch = Path(tempfile.mkdtemp(prefix=f"{model_id}_", dir=directory / "tmp"))
    return open_program(directory / "in" / teacher.file, scratch, teacher.format, teacher.architecture)


def _write_subject(
    program: Program | FileProgram,
    module: Program,
    target: Target,
    stem: Path,
    reporter: Reporter,
    artifacts: Path | None = None,
) -> Subject:
    """Return what is measured: the artifact in the runtime's format, written beside `stem` when there is none."""
    form = RUNTIME_FORMATS[target.runtime]
    path = artifacts / FILES[form] if artifacts else stem
    if not path.exists():
        path = stem.with_name(stem.name + SUFFIXES[target.runtime])
        export(program, module, form, path, target, reporter.note)
    macs = count_macs(module)
    packed = artifacts / FILES["packed"] if artifacts else None
    return Subject(
        path,
        count_parameters(program),
        macs.total,
        tuple(macs.uncounted),
        packed_bytes=packed.stat().st_size if packed is not None and packed.exists() else None,
    )
