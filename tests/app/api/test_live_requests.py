"""Generated requests over real sockets, one by one and as whole lives of things, along the links of the description.

`make fuzz-http` does the same for longer, and other requests each time.
"""

import itertools
import os
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import Bundle, initialize, rule
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.stateful.state_machine import StepInput

from app.db.session import Database
from app.main import create_app
from app.settings import Settings
from app.storage import open_storage
from tests.app.api.conftest import serve
from tests.app.api.generated import TIMEOUT_SECONDS, Requests, send_all
from tests.app.api.keyed import bearer, create_keyed_app, make_token
from tests.app.jobs.world import World
from tests.pare.conftest import Hands

NUM_EXAMPLES = int(os.environ.get("HTTP_EXAMPLES", "0"))
"""To each operation, and 20 times as many lives; 0: the few of every run, the same ones each time."""
STEPS_OF_A_LIFE = 12
JUDGED_ALONE = ("positive_data_acceptance", "negative_data_rejection", "missing_required_header")
REACHED = {("cancel_job", 202), ("delete_job", 204), ("append_to_upload", 204)}
"""Some of what requests without a past never see: operation, status."""
BEGINNINGS = (
    ("/v1/jobs", "POST"), ("/v1/jobs", "GET"), ("/v1/models", "POST"), ("/v1/datasets", "POST"),
    ("/v1/uploads", "POST"), ("/v1/webhooks", "POST"), ("/v1/keys", "POST"),
)  # fmt: skip
FILE = b"12345"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),
    pytest.mark.timeout(300 if not NUM_EXAMPLES else 24 * 3600),
]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    # Else the flood of requests would hear 429 for the most part, or nothing else would be tried.
    return settings.model_copy(update={"quota_requests_per_minute": None, "quota_queued_jobs": None})


@pytest.mark.long
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
def test_generated_requests_are_answered_as_described(
    settings: Settings, sqlite_database: Database, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.throttle.MAX_BAD_KEYS", 10**9)  # it tries every operation with bad keys, too
    headers = bearer(make_token(sqlite_database, "ann"))
    requests = Requests(mode, headers, NUM_EXAMPLES or 2, repeatable=not NUM_EXAMPLES)
    with serve(create_keyed_app(settings)) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=TIMEOUT_SECONDS, config=requests.config())
        assert send_all(schema, requests) > 50


def test_lives_of_things_are_answered_as_described(world: World, settings: Settings) -> None:
    """Made, listed, read, changed, cancelled, run, downloaded, deleted, read again: in any order."""
    hands = Hands(world.database, open_storage(settings.storage_url))
    requests = Requests(GenerationMode.POSITIVE, {}, 20 * NUM_EXAMPLES or 25, repeatable=not NUM_EXAMPLES)
    config = SchemathesisConfig.from_dict(
        {
            "generation": {"mode": "positive", "deterministic": requests.repeatable},
            "request-timeout": TIMEOUT_SECONDS,
            "phases": {"stateful": {"inference": {"algorithms": []}}},
            # What a request is answered depends on what came before it, and requests are altered below.
            "checks": {name: {"enabled": False} for name in JUDGED_ALONE},
            # A key that was revoked is still shown.
            "operations": [{"include-path-regex": "^/v1/keys", "checks": {"use_after_free": {"enabled": False}}}],
        }
    )
    seen: set[tuple[str, int]] = set()
    found: list[str] = []
    num_lives, numbers = 0, itertools.count()
    with serve(create_app(settings)) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=TIMEOUT_SECONDS, config=config)

        begins = [schema[path][method].as_strategy() for path, method in BEGINNINGS]

        class Lives(schema.as_state_machine()):  # type: ignore[misc]
            """A user who does one thing after the other, and a worker."""

            @initialize(target=Bundle("begun"), case=begins[0])
            def submit(self, case: Any) -> Any:
                """In each life there is a job."""
                return self.begin_with(case)

            @rule(target=Bundle("begun"), case=st.one_of(begins))
            def begin(self, case: Any) -> Any:
                """Begin something; which of its answers can be followed, the description says."""
                return self.begin_with(case)

            def begin_with(self, case: Any) -> Any:
                """Take the first step of what follows."""
                step = StepInput.initial(case)
                self.recorder.record_case(case=case)
                self.control.record_step(step, self.recorder)
                return self._step(step)

            def before_call(self, case: Any) -> None:
                """Say what a description cannot: which model is ready, how long the file is that will follow."""
                match case.operation.definition.raw["operationId"]:
                    case "submit_job" if isinstance(case.body, dict):
                        recipe = {"steps": [{"kind": "prune_magnitude"}]}
                        case.body |= {"model_id": world.model_id, "recipe": recipe, "needs": {}}
                        case.body.pop("webhook_id", None)
                        case.query.pop("dry_run", None)
                    case "create_webhook" if isinstance(case.body, dict):
                        case.body["url"] = f"https://8.8.8.8/{next(numbers)}"
                    case "begin_upload":
                        case.headers["Upload-Length"] = str(len(FILE))
                    case "append_to_upload":
                        case.headers["Upload-Offset"] = "0"
                        case.headers.pop("Upload-Checksum", None)
                        case.body = FILE

            def setup(self) -> None:
                """Count it."""
                nonlocal num_lives
                num_lives += 1

            def validate_response(self, *arguments: Any, **named: Any) -> None:
                """Keep what is wrong, and go on: a life that is lived again may go another way."""
                try:
                    super().validate_response(*arguments, **named)
                except FailureGroup as group:
                    found.extend(str(failure) for failure in group.exceptions)

            def after_call(self, response: Any, case: Any) -> None:
                """Remember what was seen, and let every other job run at once."""
                answered = (case.operation.definition.raw["operationId"], response.status_code)
                seen.add(answered)
                super().after_call(response, case)
                is_new = answered == ("submit_job", 202) and "idempotency-replayed" not in response.headers
                if is_new and next(numbers) % 2:
                    hands.run(response.json()["id"], {"model.onnx": b"x"})

        # Where lives lead is chance: some more, where what proves that they lead anywhere was not seen yet.
        while num_lives < requests.num_examples or (REACHED - seen and num_lives < 4 * requests.num_examples):
            # What links lead to differs from time to time, which the generator takes for its own mistake.
            with suppress(Flaky):
                Lives.run(settings=requests.hypothesis(stateful_step_count=STEPS_OF_A_LIFE))
    assert not found, "\n\n".join(dict.fromkeys(found))
    missing = REACHED - seen
    assert not missing, sorted(seen)
