"""Write the code map in docs/code-map.md: one line per module, the first sentence of its docstring.

    python scripts/codemap.py

Rooms stand in the order of `ROOMS` in tests/test_floors.py. A test fails while the page differs from the docstrings.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/code-map.md"
START, END = "<!-- map: written by scripts/codemap.py -->\n", "<!-- end of the map -->\n"


def rooms() -> list[list[str]]:
    """`ROOMS` of tests/test_floors.py: the rooms of each floor, in the order in which they may import each other."""
    tree = ast.parse((ROOT / "tests/test_floors.py").read_text(encoding="utf-8"))
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    floors: list[list[str]] = next(
        ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "ROOMS"
    )
    return floors


def first_sentence(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not docstring:
        raise SystemExit(f"{module} has no docstring")
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def modules(room: str) -> list[tuple[str, str]]:
    """Path below pairclf/ and first sentence: of the room itself, then of what it holds."""
    package = ROOT / "pairclf" / room
    if not package.is_dir():
        return [(f"{room}.py", first_sentence(package.with_suffix(".py")))]
    files = sorted(package.rglob("*.py"), key=lambda path: (path.parent != package, str(path.parent), path.stem))
    below = [(path, path.relative_to(package.parent).as_posix().removesuffix("__init__.py")) for path in files]
    return [(name, first_sentence(path)) for path, name in below]


def code_map() -> str:
    lines = []
    for floor, names in enumerate(rooms()):
        lines += ["", f"## Floor {floor}: {', '.join(names)}", "", "| file | what it owns |", "|---|---|"]
        for room in names:
            rows = modules(room)
            lines += [f"| **`{name}`** | **{sentence}** |" for name, sentence in rows[:1]]
            lines += [f"| `{name}` | {sentence} |" for name, sentence in rows[1:]]
    return "\n".join([*lines, "", ""])


def page() -> str:
    """The page as it should be: its own text, and the map between the two markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{code_map()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
