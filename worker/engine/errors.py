"""Why the engine refuses or fails; each becomes the `error` of result.json.

EngineFailure              code, detail, fix, retryable
  ModelRejected            the uploaded model is malformed, hostile or uses what Pare cannot import
  DatasetRejected          the uploaded dataset is malformed or hostile
  RecipeRefused            the recipe does not fit this model or this data
  StepFailed               a technique could not do its work on this model
  ExportFailed             the result could not be written in a format
  VerificationFailed       a written artifact does not reproduce the outputs it was made with
"""


class EngineFailure(Exception):
    """The engine could not do what the plan asks."""

    code = "engine_failure"
    fix = "Look at the job's log; if the model and recipe are right, report this as a defect of Pare."
    retryable = False

    def __init__(self, detail: str | None = None, *, code: str | None = None, fix: str | None = None) -> None:
        self.detail = detail or (self.__doc__ or "").strip()
        self.code = code or self.code
        self.fix = fix or self.fix
        super().__init__(self.detail)


class ModelRejected(EngineFailure):
    """The uploaded file is not a model that Pare accepts."""

    code = "model_rejected"
    fix = "Export the model again with torch.export.export and torch.export.save."


class DatasetRejected(EngineFailure):
    """The uploaded file is not a dataset that Pare accepts."""

    code = "dataset_rejected"
    fix = "Save plain numeric arrays of equal length with numpy.savez or safetensors.numpy.save_file."


class RecipeRefused(EngineFailure):
    """The recipe does not fit this model or data."""

    code = "recipe_refused"
    fix = "Change the recipe as the detail says."


class StepFailed(EngineFailure):
    """A step could not do its work on this model."""

    code = "step_failed"
    fix = "Change the step's parameters, or leave the named layers out with skip_layers."


class ExportFailed(EngineFailure):
    """The result could not be written in one of the formats."""

    code = "export_failed"
    fix = "Leave the named format out of recipe.outputs.formats."


class VerificationFailed(EngineFailure):
    """A written artifact does not reproduce the outputs it was made with."""

    code = "verification_failed"
    fix = "Leave the named format out of recipe.outputs.formats, and report this as a defect of Pare."
