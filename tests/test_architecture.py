"""Rules of the source tree that a linter cannot say; each fails with the name of the file that breaks it."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from app.recipes.recipe import KINDS, Recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("app", "worker", "pare", "migrations", "tests", "benchmarks", "examples")
BANNED_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}
MAX_LINES = 400
IN_ONE_PIECE = {"worker/engine/load.py": 480}
"""Users get it as a single file."""


def list_sources() -> list[Path]:
    return sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py"))


def list_project_files() -> list[Path]:
    """Return what git tracks or would track; without git (a release archive), every file that is not hidden."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    if found is not None and found.returncode == 0:
        names = (ROOT / name for name in found.stdout.split("\0") if name)
        return [path for path in names if path.is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not path.relative_to(ROOT).parts[0].startswith(".")]


def read_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def list_imports(path: Path) -> Iterator[str]:
    """Yield every module a file imports, wherever the import stands; relative imports are resolved."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(read_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def list_loaded_modules(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and return the top-level packages it brought in."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{statement} fails:\n{run.stderr}"
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import app.main", {"torch", "numpy", "onnx", "onnxruntime", "celery", "worker", "pare"}),
        ("import worker.celery_app, worker.tasks", {"torch", "numpy", "onnx", "onnxruntime", "pare"}),
        ("import worker.dispatch", {"torch", "numpy", "onnx", "onnxruntime", "pare"}),
        ("import pare", {"torch", "numpy", "app", "worker", "sqlalchemy", "fastapi", "celery"}),
        ("import pare.cli", {"torch", "numpy", "app", "worker", "sqlalchemy", "fastapi", "celery"}),
        ("import app.recipes.recipe", {"torch", "numpy", "sqlalchemy", "fastapi"}),
        ("import worker.engine.run", {"celery", "kombu", "sqlalchemy", "fastapi", "httpx2", "redis"}),
    ],
)
def test_import_brings_in_nothing_forbidden(statement: str, forbidden: set[str]) -> None:
    assert list_loaded_modules(statement) & forbidden == set()


def test_service_side_of_worker_never_imports_the_engine() -> None:
    engine = ROOT / "worker" / "engine"
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "worker").rglob("*.py"))
        if engine not in path.parents
        for name in list_imports(path)
        if name == "worker.engine" or name.startswith("worker.engine.")
    ]
    assert found == []


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kind_has_its_technique_its_test_and_its_page(kind: str) -> None:
    technique = ROOT / "worker/engine/techniques" / f"{kind}.py"
    assert technique.is_file()
    functions = {node.name for node in read_tree(technique).body if isinstance(node, ast.FunctionDef)}
    assert {"inspect", "run"} <= functions, f"{kind}.py must define inspect and run"
    assert (ROOT / "tests/engine/techniques" / f"test_{kind}.py").is_file()
    assert (ROOT / "docs/techniques" / f"{kind}.md").is_file()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_technique_imports_no_other(kind: str) -> None:
    others = {f"worker.engine.techniques.{other}" for other in KINDS if other != kind}
    assert others & set(list_imports(ROOT / "worker/engine/techniques" / f"{kind}.py")) == set()


def list_specs(root: type[BaseModel]) -> set[type[BaseModel]]:
    """Return every model that a request may contain, found through the annotations of the fields."""
    found: set[type[BaseModel]] = set()
    waiting: list[Any] = [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, type) and issubclass(item, BaseModel) and item not in found:
            found.add(item)
            waiting.extend(info.annotation for info in item.model_fields.values())
        waiting.extend(get_args(item))
    return found


@pytest.mark.parametrize("spec", sorted(list_specs(Recipe), key=str), ids=lambda spec: spec.__name__)
def test_every_field_of_a_request_is_described(spec: type[BaseModel]) -> None:
    undescribed = [
        name for name, info in spec.model_fields.items() if not (info.description or "").strip() and name != "kind"
    ]
    assert undescribed == []
    assert (spec.__doc__ or "").strip(), f"{spec.__name__} says nothing about itself"


def test_files_stay_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in list_sources()}
    named = {path.relative_to(ROOT).as_posix(): count for path, count in lines.items()}
    too_long = {name: count for name, count in named.items() if count > IN_ONE_PIECE.get(name, MAX_LINES)}
    assert too_long == {}


def test_names_say_what_a_module_is_about() -> None:
    named = [path.relative_to(ROOT) for path in list_sources()]
    vague = [str(path) for path in named if {part.removesuffix(".py") for part in path.parts} & BANNED_NAMES]
    assert vague == []


def test_first_line_of_a_module_says_what_it_is_for() -> None:
    silent = []
    for path in list_sources():
        if path.name == "__init__.py" and not path.read_text(encoding="utf-8").strip():
            continue
        first_line = (ast.get_docstring(read_tree(path)) or "").split("\n")[0]
        if not first_line.endswith((".", ":", "?")):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_source_is_ascii() -> None:
    found = [str(path.relative_to(ROOT)) for path in list_sources() if not path.read_text(encoding="utf-8").isascii()]
    assert found == []


def test_no_file_names_a_machine_path_or_a_package_registry() -> None:
    # Put together from pieces, so that this file does not contain what it looks for.
    hosts = [
        "files." + "pythonhosted.org",
        "pypi." + "org",
        "download." + "pytorch.org",
        "registry." + "npmjs.org",
    ]
    machine_paths = ["/" + "work" + "/", "/" + "opt/wheels", "/" + "opt/pypi"]
    pattern = re.compile("|".join(re.escape(text) for text in [*hosts, *machine_paths]))
    found = []
    for path in list_project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for match in pattern.finditer(text):
            # The first may stand inside a relative path; only a path that starts with it counts.
            before = text[match.start() - 1] if match.start() else " "
            if match.group().startswith("/") and (before.isalnum() or before in "_.-~}"):
                continue
            found.append(f"{path.relative_to(ROOT)}: {match.group()}")
    assert sorted(set(found)) == []


@pytest.mark.parametrize("package", ["app", "worker", "pare"])
def test_package_has_only_packages_below_it(package: str) -> None:
    """A folder without __init__.py would be missing from the built wheel's import graph and from the contracts."""
    without = [
        str(path.parent.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    ]
    assert sorted(set(without)) == []
