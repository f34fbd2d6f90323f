"""What the pages in docs/ say about settings, files and commands is what the code has."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from app.settings import Settings
from worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Their default is taken from the machine or from another setting.
COMPUTED = {"PARE_ENGINE_THREADS": "number of cores", "PARE_DATABASE_URL": "SQLite", "PARE_STORAGE_URL": "files"}


def read_compose_files() -> str:
    return "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "docker-compose.yml", *ROOT.glob("docker/*.yml"))
    )


def render_settings(settings: type[BaseSettings]) -> list[str]:
    """Return the rows of the table of docs/operations.md, made from the code."""
    prefix = settings.model_config.get("env_prefix") or ""
    rows = []
    for name, info in settings.model_fields.items():
        variable = f"{prefix}{name}".upper()
        default = COMPUTED.get(variable, str(info.default) or "empty")
        rows.append(f"| `{variable}` | {default} | {info.description} |")
    return rows


@pytest.mark.parametrize("settings", [Settings, WorkerSettings])
def test_operations_page_lists_every_setting(settings: type[BaseSettings]) -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8").splitlines()
    missing = [row for row in render_settings(settings) if row not in page]
    assert missing == [], "add these rows:\n" + "\n".join(missing)


def test_operations_page_lists_no_setting_that_is_gone() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    compose = read_compose_files()
    rows = {row.split("`")[1] for settings in (Settings, WorkerSettings) for row in render_settings(settings)}
    named = set(re.findall(r"`(PARE_[A-Z_]+)`", page))
    assert sorted(name for name in named - rows if name not in compose) == []


def test_environment_example_names_what_compose_reads() -> None:
    compose = read_compose_files()
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    offered = set(re.findall(r"^(?:# )?(PARE_[A-Z_]+)=", example, flags=re.MULTILINE))
    read = set(re.findall(r"\$\{(PARE_[A-Z_]+)", compose))
    assert sorted(offered - read) == []
    assert {"PARE_POSTGRES_PASSWORD", "PARE_BROKER_PASSWORD"} <= offered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).exists() or f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_every_threat_that_is_stopped_names_its_test() -> None:
    _, _, section = (ROOT / "docs/security.md").read_text(encoding="utf-8").partition("\n## Who may do what\n")
    rows = re.findall(r"^\|" + r"([^|\n]*)\|" * 4 + "$", section.partition("\n## ")[0], re.MULTILINE)
    threats = rows[2:]  # below the names of the columns
    assert len(threats) > 30
    for _, threat, _, proof in threats:
        assert "::test_" in proof or "not stopped" in threat or "trusted" in threat, threat


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_make_targets_named_in_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert sorted(named - targets) == []


def test_decisions_are_numbered_once_each_and_complete() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    numbers = [page.name[:4] for page in pages]
    assert numbers == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert headings[:4] == ["Context", "Decision", "Consequences", "Alternatives"], page.name


@pytest.mark.parametrize("page", sorted((ROOT / "docs/techniques").glob("*.md")), ids=lambda page: page.stem)
def test_every_technique_page_has_a_measured_example(page: Path) -> None:
    _, heading, example = page.read_text(encoding="utf-8").partition("\n## Measured\n")
    assert heading, "a section 'Measured' with a command and its output, or a link to a benchmark's page"
    assert "@@" not in example
    assert "Not measured yet" not in example
    assert "```\n$ " in example or "(../benchmarks/" in example
