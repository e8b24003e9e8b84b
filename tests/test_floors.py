"""The house stands: imports point downwards, the lower floors know no torch, and `--help` loads none."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pairclf"

ROOMS = [
    ["errors", "console", "files", "own_files", "page", "signals", "trust", "hardware", "task", "config"],
    ["scores", "data"],
    ["inputs"],
    ["bundles", "run"],
    ["model", "approaches"],
    ["inference", "runs", "inspect", "reports"],
    ["packaging", "rehearsal", "publish"],
    ["api", "playground", "demo", "cli"],
]
"""Floors from the ground up, and on each the rooms in their order: a module imports from lower floors, or earlier rooms
of its own. `pairclf` itself holds the version and the names of `api`, which it imports as they are used; `__main__`
starts `cli`."""

ORDER = {
    "": -1,
    **{room: place for place, room in enumerate(room for floor in ROOMS for room in floor)},
    "__main__": 99,
}
ALONE = {"demo": {"cli"}}
"""Rooms that nothing imports but these."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "deepspeed"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)


def room_of(module: str) -> str:
    """`pairclf.data.tables` -> `data`."""
    return [*module.split("."), ""][1]


NEWER_POLARS = {
    "Float16", "Map", "PartitionBy", "delete_iceberg", "list", "merge_sorted", "read_lines", "scan_lines",
}  # fmt: skip
"""Names of polars that 1.35 lacks, the oldest version that is accepted and that of Kaggle's images."""


def test_the_oldest_polars_has_every_name() -> None:
    """One name that it lacks, and no command starts on Kaggle."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    used = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("pl", "polars")
    }
    assert not used & NEWER_POLARS


def name_of(path: Path) -> str:
    return ".".join(["pairclf", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def arrows() -> dict[str, set[str]]:
    """What each module of the package imports of it, modules named in `from pairclf.room import module` included."""
    names = {name_of(path): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        graph[name] = (found & names.keys()) - {name}
    graph["pairclf"] = set()  # for type checkers alone: `test_importing_the_package_loads_nothing_heavy`
    return graph


def wrong_arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a later room, or of one that is not for everybody."""
    pairs = [(name, other) for name, others in graph.items() for other in others]
    rooms = [(name, other, room_of(name), room_of(other)) for name, other in pairs]
    return sorted(
        (name, other)
        for name, other, room, theirs in rooms
        if ORDER[theirs] > ORDER[room] or (theirs != room and room not in ALONE.get(theirs, {room}))
    )


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, over however many steps; nothing where there are none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_its_place_and_imports_point_downwards() -> None:
    graph = arrows()
    assert {room_of(name) for name in graph} == ORDER.keys()
    assert wrong_arrows(graph) == []


def test_no_files_import_each_other() -> None:
    """Rooms can't, as they are in one order."""
    assert circle({name: others - {name.rpartition(".")[0], "pairclf"} for name, others in arrows().items()}) == []


def test_no_module_imports_a_private_name_of_another() -> None:
    imports = (
        (path.name, name.name)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pairclf")
        for name in node.names
    )
    assert [(file, name) for file, name in imports if name.startswith("_") and not name.startswith("__")] == []


def test_wrong_arrows_and_circles_are_found() -> None:
    wrong = {
        "pairclf.data.rows": {"pairclf.model.batch", "pairclf.scores.metrics"},
        "pairclf.scores.metrics": {"pairclf.data.rows"},
        "pairclf.runs.fit": {"pairclf.demo.demo"},
        "pairclf.cli.main": {"pairclf.demo.demo"},
        "pairclf.packaging.build": {"pairclf.rehearsal.mounts"},
    }
    assert wrong_arrows(wrong) == [
        ("pairclf.data.rows", "pairclf.model.batch"),
        ("pairclf.packaging.build", "pairclf.rehearsal.mounts"),
        ("pairclf.runs.fit", "pairclf.demo.demo"),
        ("pairclf.scores.metrics", "pairclf.data.rows"),
    ]
    assert set(circle(wrong)) == {"pairclf.data.rows", "pairclf.scores.metrics"}


WITHOUT_TORCH = (
    "pairclf.publish.push", "pairclf.packaging.build", "pairclf.bundles.bundle", "pairclf.run", "pairclf.approaches",
    "pairclf.runs.cv", "pairclf.inference.predict", "pairclf.inference.serve", "pairclf.inference.worker",
    "pairclf.rehearsal.rehearse", "pairclf.runs.compare", "pairclf.runs.blend", "pairclf.runs.sweep",
    "pairclf.runs.evaluate", "pairclf.approaches.finetune.approach", "pairclf.approaches.prompt",
    "pairclf.reports.report",
)  # fmt: skip


def test_only_approaches_load_torch() -> None:
    heavy = sorted(HEAVY - {"datasets"})
    lines = [f"import sys, {', '.join(WITHOUT_TORCH)}", f"print([name for name in {heavy!r} if name in sys.modules])"]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


NOT_FOR_ERRORS = HEAVY | {"polars", "sklearn", "scipy", "nbclient"}
NOT_FOR_HELP = NOT_FOR_ERRORS | {"numpy", "pyarrow", "pydantic", "yaml", "pairclf.config", "pairclf.task"}
NOT_FOR_IMPORT = NOT_FOR_HELP | {"rich", "typer", "pairclf.errors"}


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--help"], NOT_FOR_HELP),
        (["--version"], NOT_FOR_HELP),
        (["train", "--help"], NOT_FOR_HELP),
        (["check", "--help"], NOT_FOR_HELP),
        (["rehearse", "--help"], NOT_FOR_HELP),
        (["predikt"], NOT_FOR_HELP),
        (["train"], NOT_FOR_ERRORS),
        (["train", "x.yaml", "--set", "train.num_train_epochs"], NOT_FOR_ERRORS),
        (["config", "x.yaml"], NOT_FOR_ERRORS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_typing_errors_load_nothing_heavy(command: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\nfrom pairclf.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {sorted(heavy)!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("LOADED []"), result.stdout + result.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, pairclf; print([name for name in {sorted(NOT_FOR_IMPORT)!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_command_shows_an_example() -> None:
    from typer.main import get_command

    from pairclf.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) >= 12
    assert [name for name, command in commands.items() if f"pairclf {name}" not in (command.epilog or "")] == []
