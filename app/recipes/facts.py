"""What intake finds out about an uploaded model or dataset."""

from app.recipes.base import Items, Spec


class TensorFacts(Spec):
    """One input or output. A size that may vary is a string, e.g. "batch"."""

    name: str
    dtype: str
    shape: Items[int | str]


class LayerFacts(Spec):
    """One layer with weights."""

    name: str
    type: str
    """The torch.nn class, e.g. Conv2d, Linear, LSTM."""
    shape: Items[int]
    """Of the weight."""
    parameters: int
    macs: int | None
    """For one example; None where they could not be counted."""


class Capability(Spec):
    """Whether one technique can work on this model, and on which layers."""

    kind: str
    applicable: bool
    layers: Items[str]
    """Layers it applies to."""
    missing: str | None
    """Why it does not apply, or what it leaves out."""


class ModelFacts(Spec):
    """A checked model."""

    inputs: Items[TensorFacts]
    outputs: Items[TensorFacts]
    dynamic_batch: bool
    """False: exported with a fixed batch; it is trained and measured at exactly that batch."""
    batch_size: int | None
    """The fixed batch, if any."""
    exported_in: str
    """"train" or "eval", as found in the graph."""
    parameters: int
    buffers: int
    parameter_bytes: int
    macs: int | None
    uncounted_operators: Items[str]
    layers: Items[LayerFacts]
    tied: Items[Items[str]]
    """Groups of parameter names that share one tensor."""
    tokenizer: bool = False
    """It came with its tokenizer, so its integer inputs can be made from a column of text."""
    capabilities: Items[Capability]
    warnings: Items[str] = ()


class ColumnFacts(Spec):
    """One column of a dataset; `shape` is that of one row."""

    name: str
    dtype: str
    """Of the numbers, e.g. float32; "string" for text, which the model's tokenizer makes into numbers."""
    shape: Items[int | str]
    """A size that differs between the rows is a word, e.g. "height"; only images have such, and `resize` fixes them."""


class DatasetFacts(Spec):
    """A checked dataset: columns of equal length."""

    num_rows: int
    columns: Items[ColumnFacts]
    classes: Items[str] = ()
    """format=images: the names of the classes, in the order of their numbers in column `label`."""
