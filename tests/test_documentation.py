"""Documentation agrees with the code: the code map, examples in docstrings, declared dependencies, links."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_floors import MODULES, name_of

from pairclf import errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")]

TOP = "(?:pairclf|tests|scripts|benchmarks|configs|kaggle)"

DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "kagglesdk": "kaggle"}
"""Modules whose package has another name."""

UNDECLARED = {"flash_attn"}
"""What a user installs for a GPU; a module asks for it in a `try`, and does without."""


def test_code_map_matches_docstrings() -> None:
    script = runpy.run_path(str(ROOT / "scripts/codemap.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run: python scripts/codemap.py"


def test_api_page_matches_docstrings() -> None:
    script = runpy.run_path(str(ROOT / "scripts/apidocs.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run: python scripts/apidocs.py"


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_in_docstrings_run(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(name_of(path)))
    assert result.attempted > 0
    assert result.failed == 0


def test_error_tree_is_complete() -> None:
    drawn = {name: len(indent) // 2 for indent, name in re.findall(r"^ {4}( *)(\w+Error) ", str(errors.__doc__), re.M)}
    depths = {"PairclfError": 0}
    classes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    bases = {node.name: ast.unparse(node.bases[0]) for node in classes if isinstance(node, ast.ClassDef) and node.bases}
    while new := {name: depths[base] + 1 for name, base in bases.items() if base in depths and name not in depths}:
        depths |= new
    assert drawn == depths


def imported(path: Path) -> set[str]:
    """Third-party packages that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names - sys.stdlib_module_names - {"pairclf"}


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {Requirement(line).name.lower().replace("_", "-") for line in lines}
    names = set[str]().union(*(imported(path) for path in MODULES)) - UNDECLARED
    needed = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in names}
    assert needed - declared == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_pages_lead_to_a_heading(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [(page.parent / file if file else page, anchor) for file, anchor in targets if "://" not in file]
    assert [f"{file.name}#{anchor}" for file, anchor in inside if anchor not in headings(file)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_named_in_pages_exist(page: Path) -> None:
    """`pairclf/...`, `tests/...`, `scripts/...` and so on; placeholders in capitals and results are left out."""
    if page.name == "LOG.md":  # a log of what was, under the names of its day
        return
    named = re.findall(rf"`({TOP}/[\w./-]+)", page.read_text(encoding="utf-8"))
    assert [path for path in named if not path.startswith("kaggle/build") and not (ROOT / path).exists()] == []
