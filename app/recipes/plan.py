"""The directory contract between the service side and the engine: plan in, progress lines, result out.

    DIR/in/plan.json        a Plan                                   (read-only for the engine)
    DIR/in/<file>           the files the plan names
    DIR/out/result.json     an EngineResult, written last
    DIR/out/artifacts/<f>   the files the result names, flat
    DIR/out/checkpoints/<f> what a Progress line names as a checkpoint; the service side takes it away
    DIR/tmp/                scratch

The engine prints Progress objects on stdout, one JSON object a line, and anything else on stderr. The service side
believes nothing of it: names, sizes and digests are checked again. On stdin the engine gets the line "go", and maybe
"stop" later: write a checkpoint where one can be written, and end.
"""

from typing import Annotated, Literal

from pydantic import Field

from app.recipes.base import Items, Spec
from app.recipes.facts import DatasetFacts, ModelFacts
from app.recipes.metrics import Metrics
from app.recipes.recipe import Recipe

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
FileName = Annotated[str, Field(pattern=FILE_NAME)]

Action = Literal["check_model", "check_dataset", "optimize", "verify"]
ModelFormat = Literal["pt2", "hf", "safetensors", "onnx"]
"""torch.export program; zip of a Hugging Face folder; state dict of a catalogue architecture; ONNX file."""
DatasetFormat = Literal["npz", "safetensors", "parquet", "images"]
"""Arrays; arrays; table; zip with one folder of images per class."""

MAX_RESULT_BYTES = 64 * 1024 * 1024
MAX_PROGRESS_LINE_BYTES = 64 * 1024


class ModelFile(Spec):
    """The model, as uploaded."""

    file: FileName
    format: ModelFormat
    sha256: str
    architecture: str | None = None
    """safetensors: the catalogue's name of the program that uses the weights, e.g. "resnet20"."""


class Teacher(ModelFile):
    """Another model that a step learns from."""

    id: str


class DatasetFile(Spec):
    """A dataset, as uploaded."""

    id: str
    file: FileName
    format: DatasetFormat
    sha256: str


class CheckpointFile(Spec):
    """A checkpoint on its way out of DIR/out/checkpoints or into DIR/in. What is in it only an engine knows."""

    name: FileName
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Plan(Spec):
    """What the engine shall do with the directory it is started in."""

    action: Action
    model: ModelFile | None = None
    teachers: Items[Teacher] = ()
    """The models that the recipe's steps name as teachers."""
    datasets: Items[DatasetFile] = ()
    recipe: Recipe | None = None
    num_threads: int = Field(1, ge=1)
    """Threads for training and checks; measurement uses recipe.target.num_threads."""
    isolation: Items[str] = ()
    """The layers active around this process, for the report."""
    artifacts: Items[FileName] = ()
    """verify: the artifact files to reload, found in DIR/in."""
    checkpoint_seconds: float | None = Field(None, ge=0)
    """optimize: write a checkpoint this often while something trains, and at the ends of long steps; null: never."""
    checkpoints: Items[FileName] = ()
    """optimize: checkpoints in DIR/in to go on from, newest first; the first that can be read is used."""
    split_batches: int = Field(1, ge=1)
    """optimize: training splits its batches into this many times the recipe's parts, to need less memory."""


class Progress(Spec):
    """One line of progress."""

    stage: str = Field(pattern=r"^[a-z][a-z0-9_]{0,49}$")
    """ready, open_model, measure, a technique's kind, export, verify, ..."""
    step: int | None = Field(None, ge=0)
    """Index into recipe.steps where the stage is a step."""
    fraction: float = Field(ge=0, le=1)
    """Of the whole action, never falling."""
    eta_seconds: float | None = Field(None, ge=0)
    message: str = Field("", max_length=2000)
    metrics: dict[str, float | int | str | None] = Field(default_factory=dict, max_length=50)
    """Numbers worth a chart: loss, accuracy, epoch, ..."""
    checkpoint: CheckpointFile | None = None
    """A file that is complete in DIR/out/checkpoints. It holds everything up to this line."""
    resumed: FileName | None = None
    """The checkpoint of plan.checkpoints that the work goes on from."""


class EngineError(Spec):
    """Why an action failed."""

    code: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    detail: str = Field(max_length=8000)
    fix: str = Field(max_length=4000)
    retryable: bool = False


class ArtifactFile(Spec):
    """A file in DIR/out/artifacts."""

    name: FileName
    media_type: str = Field(pattern=r"^[a-z]+/[A-Za-z0-9.+-]+$", max_length=100)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class EngineResult(Spec):
    """DIR/out/result.json. Exactly what belongs to the action is set; `error` alone when it failed."""

    error: EngineError | None = None
    model: ModelFacts | None = None
    dataset: DatasetFacts | None = None
    metrics: Metrics | None = None
    artifacts: Items[ArtifactFile] = Field((), max_length=100)
