"""Another model as teacher: it must exist, be ready and fit; it travels with the claim and stays while it is needed."""

from typing import Any

import pytest

from app import jobs
from app.db.tables import ModelRow
from app.errors import Conflict, InvalidRequest, NotReady
from app.jobs.uploads import delete_upload
from app.recipes.facts import ModelFacts, TensorFacts
from app.recipes.recipe import Recipe
from tests.app.jobs.world import OWNER, REFUSAL, World, model_facts


def lesson(world: World, teacher: str, **distill: Any) -> Recipe:
    step = {"kind": "distill", "teacher_model_id": teacher, **distill}
    data = {"dataset_id": world.add_dataset(), "inputs": {"x": {"column": "image"}}}
    return Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}, step], "data": data})


def delete(world: World, model_id: str) -> None:
    with world.database.session() as session:
        delete_upload(session, ModelRow, OWNER, model_id)


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorFacts:
    return TensorFacts(name=name, dtype=dtype, shape=shape)


def test_the_teacher_travels_with_the_claim(world: World) -> None:
    teacher = world.add_model()
    claim = world.start(world.submit(lesson(world, teacher)))
    assert [stored.id for stored in claim.teachers] == [teacher]
    assert claim.model is not None
    assert claim.model.id == world.model_id
    assert world.start(world.submit()).teachers == ()


def test_the_job_s_own_model_may_teach_and_two_steps_may_share_a_teacher(world: World) -> None:
    step = {"kind": "distill", "teacher_model_id": world.model_id}
    base = lesson(world, world.model_id)
    assert base.data is not None
    recipe = Recipe.model_validate({"steps": [step, step], "data": base.data.model_dump(mode="json")})
    assert [stored.id for stored in world.start(world.submit(recipe)).teachers] == [world.model_id]


@pytest.mark.parametrize("dry", [False, True])
def test_unknown_and_foreign_teachers_are_named_with_their_place(world: World, dry: bool) -> None:
    for teacher in ("mdl_" + "z" * 26, world.add_model(owner="stranger")):
        with pytest.raises(InvalidRequest) as caught:
            check(world, lesson(world, teacher), dry)
        assert [problem.pointer for problem in caught.value.errors] == ["/recipe/steps/1/teacher_model_id"]


def check(world: World, recipe: Recipe, dry: bool) -> None:
    if not dry:
        world.submit(recipe)
        return
    with world.database.read() as session:
        jobs.validate_submission(
            session, world.settings, owner=OWNER, model_id=world.model_id, recipe=recipe, deadline_seconds=None
        )


def test_a_teacher_that_is_not_ready_is_a_conflict(world: World) -> None:
    with pytest.raises(NotReady) as caught:
        world.submit(lesson(world, world.add_model("checking")))
    assert caught.value.code == "model_not_ready"
    with pytest.raises(Conflict, match="bad magic"):
        world.submit(lesson(world, world.add_model("rejected")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": [tensor("y", "batch", 3, 8, 8)]}, r"inputs are \['y'\]"),
        ({"inputs": [tensor("x", "batch", 3, 8, 8, dtype="float64")]}, "float64"),
        ({"inputs": [tensor("x", "batch", 3, 9, 8)]}, r"\['batch', 3, 9, 8\]"),
        ({"inputs": [tensor("x", 4, 3, 8, 8)], "batch_size": 4}, r"\[4, 3, 8, 8\]"),
        ({"outputs": [tensor("logits", "batch", 11)]}, "output 0 of the teacher"),
        ({"outputs": []}, "the teacher has 0 outputs"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_at_its_step(world: World, changes: dict[str, Any], words: str) -> None:
    teacher = world.add_model(facts=model_facts(**changes))
    with pytest.raises(InvalidRequest, match=words) as caught:
        world.submit(lesson(world, teacher))
    assert [problem.pointer for problem in caught.value.errors] == ["/recipe/steps/1/teacher_model_id"]


def test_a_teacher_may_differ_in_names_of_outputs_and_in_sizes_that_vary(world: World) -> None:
    free = model_facts(inputs=[tensor("x", "rows", 3, "height", "width")], outputs=[tensor("scores", "rows", 10)])
    assert world.submit(lesson(world, world.add_model(facts=free)))


def test_layers_in_pairs_are_looked_up_on_their_own_side(world: World) -> None:
    facts = model_facts()
    renamed = [layer.model_copy(update={"name": "t_" + layer.name}) for layer in facts.layers]
    teacher = world.add_model(facts=ModelFacts.model_validate(facts.model_copy(update={"layers": tuple(renamed)})))
    assert world.submit(lesson(world, teacher, hidden_weight=1.0, pairs=[{"student": "conv", "teacher": "t_conv"}]))
    with pytest.raises(InvalidRequest) as caught:
        world.submit(lesson(world, teacher, hidden_weight=1.0, pairs=[{"student": "t_conv", "teacher": "conv"}]))
    places = [problem.pointer for problem in caught.value.errors]
    assert places == ["/recipe/steps/1/pairs/0/student", "/recipe/steps/1/pairs/0/teacher"]


def test_a_teacher_stays_as_long_as_a_job_needs_it(world: World) -> None:
    teacher, other = world.add_model(), world.add_model()
    job = world.submit(lesson(world, teacher))
    with pytest.raises(Conflict, match=job) as caught:
        delete(world, teacher)
    assert caught.value.code == "model_in_use"
    delete(world, other)
    claim = world.start(job)
    with pytest.raises(Conflict):
        delete(world, teacher)
    world.fail(claim, REFUSAL)
    delete(world, teacher)
    with pytest.raises(Conflict) as caught, world.database.session() as session:
        jobs.retry_job(session, world.settings, OWNER, job)
    assert caught.value.code == "model_deleted"
    assert world.job(job).state == "failed"


def test_options_of_training_that_cannot_work_are_named(world: World) -> None:
    facts = model_facts(inputs=[tensor("x", "batch", 8)])
    recipe = lesson(world, world.model_id, label_smoothing=0.1, augmentations=["flip"], teacher_model_id=None)
    with pytest.raises(InvalidRequest) as caught:
        world.submit(recipe, model_id=world.add_model(facts=facts))
    places = {problem.pointer for problem in caught.value.errors}
    assert {"/recipe/steps/1/label_smoothing", "/recipe/steps/1/augmentations"} <= places
