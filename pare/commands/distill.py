"""`pare distill`: teach a smaller model what a model knows."""

from typing import Annotated, Any

import typer

from pare.commands.data_options import EvaluationDataset, Input, LabelColumn, Task, bind_dataset
from pare.commands.invocation import Invocation, service_command
from pare.commands.recipe_options import read_object, split_pairs
from pare.commands.tables import job_page
from pare.commands.watching import exit_as, watch


@service_command
def distill(
    call: Invocation,
    model: Annotated[str, typer.Option(help="Id of the model that teaches.")],
    dataset: Annotated[str, typer.Option(help="Id of the dataset.")],
    plan: Annotated[
        str | None, typer.Option(help="JSON file with a distillation, which the options below complete; - reads stdin.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="An architecture of the catalogue or the id of a model, instead of a derived one."),
    ] = None,
    width: Annotated[float | None, typer.Option(help="Share of the channels that a derived student keeps.")] = None,
    depth: Annotated[float | None, typer.Option(help="Share of the blocks that a derived student keeps.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the student's training.")] = None,
    teacher_epochs: Annotated[
        int | None, typer.Option(min=1, help="Fine-tune the teacher for so many epochs first; else it is trained.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=2, help="Try so many hyper-parameters first.")] = None,
    evaluation_dataset: EvaluationDataset = None,
    task: Task = "none",
    label_column: LabelColumn = None,
    input: Input = None,
    label: Annotated[list[str] | None, typer.Option(help="A label of the job, repeatable: name=value.")] = None,
    priority: Annotated[int | None, typer.Option(min=-10, max=10, help="Of all its parts.")] = None,
    deadline_seconds: Annotated[int | None, typer.Option(min=1, help="For all stages together.")] = None,
    webhook: Annotated[str | None, typer.Option(help="Id of a webhook that hears of the job.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the job until it has finished.")] = False,
) -> None:
    """Teach a smaller model what a model knows: one job that trains, tunes and compares."""
    request = read_object(plan) if plan is not None else {}
    _complete(request, student, width, depth, epochs, teacher_epochs, trials)
    with call.client() as client:
        binding = bind_dataset(
            client, model, dataset,
            evaluation_dataset=evaluation_dataset, task=task, label_column=label_column, input=input,
        )  # fmt: skip
        request["data"] = {**binding, **request.get("data", {})}
        if dry_run:
            call.show(client.distillations.validate(model, request))
            return
        job = client.distillations.submit(
            model,
            request,
            labels=split_pairs(label or [], "--label") or None,
            priority=priority,
            deadline_seconds=deadline_seconds,
            webhook_id=webhook,
        )
        if wait:
            job = watch(client, job.id, quiet=call.json)
    call.show(job.raw, job_page(job))
    exit_as(job)


def _complete(
    request: dict[str, Any],
    student: str | None,
    width: float | None,
    depth: float | None,
    epochs: int | None,
    teacher_epochs: int | None,
    trials: int | None,
) -> None:
    """Write the options into the request, over what its file says."""
    if student is not None:
        request["student"] = {"kind": "take_student", "student": student}
    derived = {name: value for name, value in (("width", width), ("depth", depth)) if value is not None}
    request["student"] = {**request.get("student", {"kind": "derive_student"}), **derived}
    request["training"] = {"kind": "distill", **request.get("training", {})}
    if epochs is not None:
        request["training"]["epochs"] = epochs
    if teacher_epochs is not None:
        training = request.get("teacher_training") or {"kind": "finetune"}
        request["teacher_training"] = {**training, "epochs": teacher_epochs}
    if trials is not None:
        request["tuning"] = {**(request.get("tuning") or {}), "num_trials": trials}
