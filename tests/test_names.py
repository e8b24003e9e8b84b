"""Names of the package: one class a name, no riddles, no function longer than a screen."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pairclf"
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_shipped" not in path.parts
}

MAX_LINES = 60
"""Lines of a function, without its docstring."""

RIDDLES = frozenset({"one", "found", "made", "shown", "given", "wanted", "told", "known", "here", "there"})
"""Names that don't say what they hold."""

MAX_RIDDLES = 0.02
"""Largest share of such names among all names that a room binds."""

ROOMS = ("approaches/finetune", "bundles", "inference", "inputs", "model", "packaging", "publish", "rehearsal")


def duplicates(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Class names that are defined more than once, with the files."""
    files = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                files[node.name].append(path)
    return {name: paths for name, paths in files.items() if len(paths) > 1}


def long_functions(trees: dict[str, ast.Module]) -> dict[str, int]:
    """`{file:function: lines}` of functions over `MAX_LINES`."""
    lengths = {
        f"{path}:{node.name}": _lines(node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    docstring = function.body[0]
    if ast.get_docstring(function) is not None and docstring.end_lineno is not None:
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def bindings(tree: ast.Module) -> Iterator[str]:
    """Names of variables and parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def test_class_names_are_unique() -> None:
    assert duplicates(TREES) == {}


def test_a_duplicate_is_found() -> None:
    tree = ast.parse("class A: ...\nclass B: ...")
    assert duplicates({"x.py": tree, "y.py": ast.parse("class A: ...")}) == {"A": ["x.py", "y.py"]}


def test_functions_fit_on_a_screen() -> None:
    assert long_functions(TREES) == {}


def test_a_long_function_is_found_and_its_docstring_not_counted() -> None:
    body = "    pass\n" * MAX_LINES
    tree = ast.parse(f"def long():\n{body}\ndef short():\n    '''a\n    b\n    c\n    '''\n    pass\n")
    assert long_functions({"x.py": tree}) == {"x.py:long": MAX_LINES + 1}


def test_names_say_what_they_hold() -> None:
    shares = {}
    for room in ROOMS:
        names = Counter(name for path, tree in TREES.items() if path.startswith(f"{room}/") for name in bindings(tree))
        assert names, f"{room} has no modules"
        shares[room] = sum(names[name] for name in RIDDLES) / names.total()
    assert {room: share for room, share in shares.items() if share >= MAX_RIDDLES} == {}
