"""Options that say how a dataset feeds a model, and what they become in a request."""

from typing import Annotated, Any

import typer

from pare.client import Client
from pare.commands.recipe_options import read_value, split_pairs
from pare.data import bind

EvaluationDataset = Annotated[
    str | None, typer.Option(help="Id of a dataset to measure quality on; else rows of --dataset are held out.")
]
Task = Annotated[str, typer.Option(help="classification, regression, ...; none for unlabelled data.")]
LabelColumn = Annotated[str | None, typer.Option(help="Default: y, label or labels.")]
Input = Annotated[
    list[str] | None,
    typer.Option(
        help="Feed a model input from a column, repeatable: input=column, or "
        "input=column,layout=nhwc_to_nchw,scale=0.0039 with mean, std (a/b/c: one for each channel) and max_tokens."
    ),
]


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
        inputs={name: _parse_binding(text) for name, text in split_pairs(input or [], "--input").items()},
    )
    if evaluation_dataset is not None:
        binding["evaluation_dataset_id"] = client.datasets.wait(evaluation_dataset).id
    return binding


def _parse_binding(text: str) -> dict[str, Any]:
    """Read column,name=value,name=value; numbers with a / between them are a list."""
    column, *pairs = text.split(",")
    values = {name: read_value(value) for name, value in split_pairs(pairs, "--input").items()}
    for name in ("mean", "std"):
        if name in values:
            values[name] = [read_value(each) for each in str(values[name]).split("/")]
    return {"column": column, **values}
