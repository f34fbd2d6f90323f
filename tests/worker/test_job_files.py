"""The files of a job on their way from storage into the engine's directory."""

from pathlib import Path

from app.jobs import Claim, StoredFile
from app.storage import Section, open_storage, owner_storage
from worker.job_files import place_inputs


def store(storage: Section, id: str, content: bytes, format: str, architecture: str | None = None) -> StoredFile:
    with storage.writer() as writer:
        writer.write(content)
        blob = writer.commit()
    return StoredFile(id, format, blob.sha256, blob.size_bytes, architecture)


def test_model_teachers_and_datasets_get_names_of_their_own(tmp_path: Path) -> None:
    storage = owner_storage(open_storage((tmp_path / "store").as_uri()), "local")
    model = store(storage, "mdl_" + "m" * 26, b"the student", "pt2")
    teachers = (
        store(storage, "mdl_" + "t" * 26, b"a teacher", "safetensors", "mlp"),
        store(storage, "mdl_" + "u" * 26, b"weights", "safetensors", "resnet20"),
    )
    dataset = store(storage, "dst_" + "d" * 26, b"rows", "npz")
    claim = Claim(
        job_id="job_" + "j" * 26, owner="local", epoch=1, attempt=1, max_attempts=3, action="optimize", recipe=None,
        model=model, datasets=(dataset,), teachers=teachers, deadline_seconds=60,
    )  # fmt: skip
    (tmp_path / "job" / "in").mkdir(parents=True)

    placed = place_inputs(tmp_path / "job", claim, storage)

    assert placed.model is not None
    assert [(each.id, each.format, each.architecture) for each in placed.teachers] == [
        (teachers[0].id, "safetensors", "mlp"),
        (teachers[1].id, "safetensors", "resnet20"),
    ]
    named = [placed.model.file, *(each.file for each in placed.teachers), placed.datasets[0].file]
    contents = {path.name: path.read_bytes() for path in (tmp_path / "job" / "in").iterdir()}
    assert [contents[name] for name in named] == [b"the student", b"a teacher", b"weights", b"rows"]
    assert len(contents) == 4
