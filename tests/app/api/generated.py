"""Requests that schemathesis makes of the API description, and its judgement of the answers."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.core.control import SkipTest
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

JUDGED_BY_STATE = {
    "list_models", "list_datasets", "list_jobs", "submit_job", "submit_distillation", "download_artifact",
    "upload_model", "begin_upload", "list_webhooks", "create_webhook", "change_webhook", "list_keys", "list_actions",
}  # fmt: skip
"""A schema cannot say which cursors were given out, which models there are, how long a file is, which format needs an
architecture, or which addresses are public."""

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")

REFUSALS = ["400", "401", "403", "406", "412", "415", "422"]
EXPECTED_STATUSES = {
    "negative_data_rejection": {"expected-statuses": [*REFUSALS, "404", "405", "409", "428", "429", "5xx"]},
    "missing_required_header": {"expected-statuses": REFUSALS},
}
"""Those that schemathesis expects by itself, and 412: the tus protocol prescribes it for a missing version."""


TIMEOUT_SECONDS = 60
"""How long an answer may take on a machine that does much else."""


def list_operations(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return path, method and operation of everything described."""
    return [(path, method, item) for path, items in description["paths"].items() for method, item in items.items()]


@dataclass(frozen=True)
class Requests:
    """What is sent: good requests or spoiled ones, with which key, how many to each operation."""

    mode: GenerationMode
    headers: dict[str, str]
    num_examples: int
    repeatable: bool = True
    """The same requests every time."""

    def config(self) -> SchemathesisConfig:
        """Return the configuration for the schema that they are made of."""
        generation = {"mode": self.mode.value, "deterministic": self.repeatable}
        options = {"checks": EXPECTED_STATUSES, "request-timeout": TIMEOUT_SECONDS}
        return SchemathesisConfig.from_dict({"generation": generation, **options})

    def hypothesis(self, **changes: Any) -> hypothesis_settings:
        """Return the settings of the generator."""
        return hypothesis_settings(
            max_examples=self.num_examples,
            deadline=None,
            derandomize=self.repeatable,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=not self.repeatable,
            **changes,
        )


def send_all(schema: Any, requests: Requests) -> int:
    """Send generated requests to every operation and let schemathesis judge the answers; return how many."""
    if requests.mode is GenerationMode.NEGATIVE:
        for _, _, operation in list_operations(schema.raw_schema):
            operation.pop("security", None)  # else it spoils requests by taking the key away, and we put it back
    num_cases = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        num_cases += _send(found.ok(), requests)
    return num_cases


def _send(operation: Any, requests: Requests) -> int:
    num_cases = 0
    name = operation.definition.raw["operationId"]

    @requests.hypothesis()
    @given(case=operation.as_strategy(generation_mode=requests.mode))
    def send(case: Any) -> None:
        nonlocal num_cases
        num_cases += 1
        # Not one of the requests about keys can end ours: it is not among what they may name.
        excluded = [positive_data_acceptance] if name in JUDGED_BY_STATE else []
        case.call_and_validate(headers=requests.headers, excluded_checks=excluded)

    with suppress(SkipTest):  # nothing can be wrong with a request that takes nothing
        send()
    return num_cases
