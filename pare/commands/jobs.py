"""`pare jobs`: submit, list, get, wait, cancel, retry, delete; with what job_outcome.py adds."""

from typing import Annotated

import typer

from pare.commands import job_outcome
from pare.commands.data_options import EvaluationDataset, Input, LabelColumn, Task, bind_dataset
from pare.commands.invocation import Invocation, service_command
from pare.commands.recipe_options import read_recipe, split_pairs
from pare.commands.tables import distillation_page, job_page, jobs_table
from pare.commands.watching import exit_as, watch
from pare.errors import UsageError
from pare.recipes import complete_recipe

app = typer.Typer(help="Requests to run a recipe on a model.", no_args_is_help=True)


@app.command()
@service_command
def submit(
    call: Invocation,
    model: Annotated[str, typer.Option(help="Id of the model.")],
    recipe: Annotated[
        str | None, typer.Option(help="JSON file with a recipe or a list of steps; - reads standard input.")
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(help="A step instead of a file, repeatable: kind, or kind:name=value,name=value."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset.")] = None,
    evaluation_dataset: EvaluationDataset = None,
    task: Task = "none",
    label_column: LabelColumn = None,
    input: Input = None,
    label: Annotated[list[str] | None, typer.Option(help="A label of the job, repeatable: name=value.")] = None,
    priority: Annotated[int | None, typer.Option(min=-10, max=10)] = None,
    deadline_seconds: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[str | None, typer.Option(help="Kind of worker that runs it: cpu or gpu.")] = None,
    num_devices: Annotated[int | None, typer.Option(min=0, help="GPUs that it has for itself.")] = None,
    memory_bytes: Annotated[int | None, typer.Option(min=0, help="Memory the worker must have for it.")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads the worker must have for it.")] = None,
    webhook: Annotated[str | None, typer.Option(help="Id of a webhook that hears of the job.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never makes a second job.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the job until it has finished.")] = False,
) -> None:
    """Submit a job."""
    steps = read_recipe(recipe, step or [])
    with call.client() as client:
        binding = None
        if dataset is not None:
            binding = bind_dataset(
                client, model, dataset,
                evaluation_dataset=evaluation_dataset, task=task, label_column=label_column, input=input,
            )  # fmt: skip
        elif task != "none" or label_column or input or evaluation_dataset:
            raise UsageError(
                "--task, --label-column, --input and --evaluation-dataset say how a dataset is used",
                fix="Add --dataset.",
            )
        whole = complete_recipe(steps, data=binding)
        asked: dict[str, str | int | None] = {
            "device": device,
            "num_devices": num_devices,
            "memory_bytes": memory_bytes,
            "num_threads": num_threads,
        }
        needs = {name: value for name, value in asked.items() if value is not None}
        if dry_run:
            call.show(client.jobs.validate(model, whole, priority=priority, needs=needs))
            return
        job = client.jobs.submit(
            model,
            whole,
            labels=split_pairs(label or [], "--label") or None,
            priority=priority,
            deadline_seconds=deadline_seconds,
            needs=needs,
            webhook_id=webhook,
            idempotency_key=idempotency_key,
        )
        if wait:
            job = watch(client, job.id, quiet=call.json)
    call.show(job.raw, job_page(job))
    exit_as(job)


@app.command("list")
@service_command
def list_jobs(
    call: Invocation,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
) -> None:
    """List jobs."""
    with call.client() as client:
        jobs = client.jobs.list(limit=limit)
    call.show({"items": [job.raw for job in jobs]}, jobs_table(jobs))


@app.command()
@service_command
def get(call: Invocation, id: str) -> None:
    """Show one job; of a distillation its parts and trials too."""
    with call.client() as client:
        job = client.jobs.get(id)
        found = client.distillations.get(id) if job.raw["links"].get("distillation") else None
    call.show(job.raw, job_page(job) if found is None else distillation_page(found))


@app.command()
@service_command
def wait(
    call: Invocation,
    id: str,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds; the job goes on.")] = None,
) -> None:
    """Show a job until it has finished; exit code 0 if it succeeded. Ctrl-C detaches."""
    with call.client() as client:
        job = watch(client, id, timeout_seconds=timeout, quiet=call.json)
    call.show(job.raw, job_page(job))
    exit_as(job)


@app.command()
@service_command
def cancel(call: Invocation, id: str) -> None:
    """End a job."""
    with call.client() as client:
        job = client.jobs.cancel(id)
    call.show(job.raw, f"{job.id} is {job.status}")


@app.command()
@service_command
def retry(
    call: Invocation,
    id: str,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start from the beginning, not from the last checkpoint.")
    ] = False,
) -> None:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
    with call.client() as client:
        job = client.jobs.retry(id, fresh=fresh)
    call.show(job.raw, f"{job.id} is {job.status}")


@app.command()
@service_command
def delete(call: Invocation, id: str) -> None:
    """Delete a finished job with its artifacts."""
    with call.client() as client:
        client.jobs.delete(id)
    call.show({"id": id, "deleted": True}, f"deleted {id}")


job_outcome.add_to(app)
