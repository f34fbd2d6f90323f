"""The life of a job: the table, its one door, and random lives that follow a model of a few lines."""

import ast
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

import app
from app import jobs
from app.db.tables import ArtifactRow
from app.errors import Conflict
from app.jobs import MOVES, TERMINAL, State, check_move
from app.jobs.lifecycle import move
from app.recipes.plan import ArtifactFile, EngineResult
from app.storage import Blob
from tests.app.jobs.world import CRASH, REFUSAL, World

ARTIFACT = ArtifactFile(name="a.onnx", media_type="application/onnx", size_bytes=5, sha256="cd" * 32)


def test_every_state_has_its_moves_and_ends_are_ends() -> None:
    assert set(MOVES) == set(State)
    assert {state for state in State if not MOVES[state] - {State.QUEUED}} == TERMINAL
    assert MOVES[State.SUCCEEDED] == frozenset()
    assert MOVES[State.CANCELLING] == {State.CANCELLED}, "cancel wins over retry"


@pytest.mark.parametrize("source", State)
@pytest.mark.parametrize("target", State)
def test_moves_outside_the_table_are_mistakes(source: State, target: State) -> None:
    if target in MOVES[source]:
        check_move(source, target)
    else:
        with pytest.raises(AssertionError, match=f"no move from {source} to {target}"):
            check_move(source, target)


def test_the_door_asks_the_table(world: World) -> None:
    job_id = world.submit()
    with pytest.raises(AssertionError, match="no move"), world.database.session() as session:
        move(session, job_id, sources=[State.QUEUED], target=State.SUCCEEDED)
    assert world.job(job_id).state == "queued"


def test_nobody_else_sets_a_state() -> None:
    """Only lifecycle.py moves a job; checks.py writes its first state, and with uploads.py those of uploads."""
    allowed = {"lifecycle.py", "checks.py", "uploads.py"}
    for path in sorted(Path(app.__file__).parent.joinpath("jobs").glob("*.py")):
        if path.name in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            written = (
                (isinstance(node, ast.keyword) and node.arg == "state")
                or (
                    isinstance(node, ast.Dict)
                    and any(isinstance(key, ast.Constant) and key.value == "state" for key in node.keys)
                )
                or (isinstance(node, ast.Attribute) and node.attr == "state" and isinstance(node.ctx, ast.Store))
            )
            assert not written, f"{path.name}:{getattr(node, 'lineno', 0)} sets a state"


class Life(RuleBasedStateMachine):
    """One job, acted on by a user, two workers of different age and a reaper; the model is `expected`."""

    world: World

    @initialize()
    def submit(self) -> None:
        self.job_id = self.world.submit()
        self.claims: list[jobs.Claim] = []
        self.expected = ["queued"]
        self.attempt = 0
        self.max_attempts = 3

    @property
    def state(self) -> str:
        return self.expected[-1]

    def held(self, claim: jobs.Claim) -> bool:
        return claim is self.claims[-1] and self.state in ("running", "cancelling")

    @rule()
    def claim(self) -> None:
        claim = self.world.claim(self.job_id)
        assert (claim is not None) == (self.state == "queued")
        if claim:
            self.claims.append(claim)
            self.attempt += 1
            assert (claim.epoch, claim.attempt) == (len(self.claims), self.attempt)
            self.expected.append("running")

    @rule()
    def cancel(self) -> None:
        if self.state in ("succeeded", "failed", "cancelled"):
            with pytest.raises(Conflict):
                self.world.cancel(self.job_id)
            return
        self.world.cancel(self.job_id)
        target = {"queued": "cancelled"}.get(self.state, "cancelling")
        if self.state != target:
            self.expected.append(target)

    @precondition(lambda self: self.claims)
    @rule(newest=st.booleans())
    def heartbeat(self, newest: bool) -> None:
        claim = self.claims[-1 if newest else 0]
        with self.world.database.session() as session:
            state = jobs.heartbeat(session, self.job_id, claim.epoch, 30)
        assert state == (self.state if self.held(claim) else None)

    @precondition(lambda self: self.claims)
    @rule(newest=st.booleans())
    def succeed(self, newest: bool) -> None:
        claim = self.claims[-1 if newest else 0]
        with self.world.database.session() as session:
            done = jobs.succeed(session, claim, EngineResult(artifacts=(ARTIFACT,)), {"a.onnx": Blob("cd" * 32, 5)}, [])
        assert done == (self.held(claim) and self.state == "running")
        if done:
            self.expected.append("succeeded")

    @precondition(lambda self: self.claims)
    @rule(newest=st.booleans(), retryable=st.booleans())
    def fail(self, newest: bool, retryable: bool) -> None:
        claim = self.claims[-1 if newest else 0]
        done = self.world.fail(claim, CRASH if retryable else REFUSAL)
        assert done == self.held(claim)
        if done:
            again = retryable and self.attempt < self.max_attempts
            self.expected.append("cancelled" if self.state == "cancelling" else "queued" if again else "failed")

    @precondition(lambda self: self.claims)
    @rule(newest=st.booleans())
    def confirm_cancelled(self, newest: bool) -> None:
        claim = self.claims[-1 if newest else 0]
        with self.world.database.session() as session:
            done = jobs.confirm_cancelled(session, claim)
        assert done == (self.held(claim) and self.state == "cancelling")
        if done:
            self.expected.append("cancelled")

    @rule(expired=st.booleans())
    def reap(self, expired: bool) -> None:
        owned = self.state in ("running", "cancelling")
        if expired and owned:
            self.world.expire_lease(self.job_id)
        assert self.world.reap() == ([self.job_id] if expired and owned else [])
        if expired and owned:
            again = self.attempt < self.max_attempts
            self.expected.append("cancelled" if self.state == "cancelling" else "queued" if again else "failed")

    @rule()
    def retry(self) -> None:
        with self.world.database.session() as session:
            if self.state in ("failed", "cancelled"):
                jobs.retry_job(session, self.world.settings, "local", self.job_id)
                self.expected.append("queued")
                self.max_attempts = self.attempt + 3
            else:
                with pytest.raises(Conflict):
                    jobs.retry_job(session, self.world.settings, "local", self.job_id)

    @invariant()
    def job_is_as_expected(self) -> None:
        if not hasattr(self, "job_id"):
            return
        job = self.world.job(self.job_id)
        assert self.world.states(self.job_id) == self.expected
        assert (job.state, job.attempt, job.max_attempts) == (self.state, self.attempt, self.max_attempts)
        assert [event.seq for event in self.world.events(self.job_id)] == list(range(1, job.last_seq + 1))
        assert (job.lease_until is not None) == (self.state in ("running", "cancelling"))
        assert (job.finished_at is not None) == (State(self.state) in TERMINAL)
        assert (self.state == "queued") <= (self.job_id in self.world.outbox()), "a waiting job has no hint"
        with self.world.database.read() as session:
            epochs = list(session.scalars(select(ArtifactRow.epoch).where(ArtifactRow.job_id == self.job_id)))
        assert epochs == ([len(self.claims)] if self.state == "succeeded" else [])


def test_random_lives_follow_the_model(world: World) -> None:
    class LifeHere(Life):
        pass

    LifeHere.world = world
    run_state_machine_as_test(
        LifeHere,
        settings=settings(
            max_examples=15,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
