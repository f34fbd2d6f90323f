"""Options that say how a dataset feeds a model, and what they become in a request."""

from typing import Annotated, Any

import typer

from pare.client import Client
from pare.commands.recipe_options import split_pairs
from pare.data import bind

EvaluationDataset = Annotated[
    str | None, typer.Option(help="Id of a dataset to measure quality on; else rows of --dataset are held out.")
]
Task = Annotated[str, typer.Option(help="classification, regression, ...; none for unlabelled data.")]
LabelColumn = Annotated[str | None, typer.Option(help="Default: y, label or labels.")]
Input = Annotated[list[str] | None, typer.Option(help="Feed a model input from a column, repeatable: input=column.")]


def bind_dataset(
    client: Client,
    model: str,
    dataset: str,
    *,
    evaluation_dataset: str | None,
    task: str,
    label_column: str | None,
    input: list[str] | None,
) -> dict[str, Any]:
    """Return the `data` of a request; waits until the service has checked the model and the datasets."""
    binding = bind(
        client.models.wait(model),
        client.datasets.wait(dataset),
        task=task,
        label_column=label_column,
        inputs=split_pairs(input or [], "--input"),
    )
    if evaluation_dataset is not None:
        binding["evaluation_dataset_id"] = client.datasets.wait(evaluation_dataset).id
    return binding
