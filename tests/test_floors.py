"""The house stands: imports point downwards, the lower floors know no torch, and `--help` loads none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pairclf"

FLOORS = {
    "pairclf": 0, "errors": 0, "task": 0, "config": 0, "files": 0, "console": 0, "dispositions": 0,
    "data": 1, "scores": 1, "inputs": 2, "model": 3, "jobs": 4, "inference": 4, "packaging": 4, "rehearsal": 4,
    "trust": 0, "publish": 4, "cli": 5, "__main__": 5,
}  # fmt: skip
ROOMS = {
    "words": ["errors", "console", "files", "trust", "task", "config"],
    "data": ["csv_syntax", "formats", "tables", "arena", "duplicates", "folds", "identity", "audit"],
    "scores": ["metrics", "probabilities", "calibration", "blend"],
    "inputs": ["truncate", "chat", "tokenise", "render", "plan", "cache"],
    "model": [
        "batch", "layouts", "attention", "trim", "precision", "isolation", "readout", "folder", "backbone", "engine",
        "bundle",
    ],
}  # fmt: skip
TO_KAGGLE = ["packaging", "rehearsal", "publish"]
"""Rooms of one floor, each of which builds on those before it."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "deepspeed"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)


def room_of(module: str) -> str:
    """`pairclf.data.tables` -> `data`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports(path: Path) -> set[str]:
    """Every absolute import in the file, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(str(node.module))
    return found


NEWER_POLARS = {
    "Float16", "Map", "PartitionBy", "delete_iceberg", "list", "merge_sorted", "read_lines", "scan_lines",
}  # fmt: skip
"""Names of polars that 1.35 lacks, the oldest version that is accepted and that of Kaggle's images."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_oldest_polars_has_every_name(path: Path) -> None:
    """One name that it lacks, and no command starts on Kaggle."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("pl", "polars")
    }
    assert not used & NEWER_POLARS


def name_of(path: Path) -> str:
    return ".".join(["pairclf", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def wrong_arrows(name: str, imported: set[str]) -> list[str]:
    floor = FLOORS[room_of(name)]
    upwards = [other for other in imported if other.startswith("pairclf.") and FLOORS[room_of(other)] > floor]
    heavy = [other for other in imported if other.split(".")[0] in HEAVY - {"datasets"}] if floor <= 2 else []
    back = [other for other in imported if other.startswith("pairclf.") and _is_later(room_of(name), room_of(other))]
    return sorted([*upwards, *heavy, *back, *backwards(name, imported)])


def _is_later(room: str, other: str) -> bool:
    return room in TO_KAGGLE and other in TO_KAGGLE[TO_KAGGLE.index(room) + 1 :]


def backwards(name: str, imported: set[str]) -> list[str]:
    """Imports from a later module of the same room, for rooms whose order is laid down."""
    parts = name.split(".")
    order = ROOMS["words"] if FLOORS[room_of(name)] == 0 else ROOMS.get(room_of(name), [])
    if parts[-1] not in order:
        return []
    later = order[order.index(parts[-1]) + 1 :]
    prefix = ".".join(parts[:-1])
    return [f"{prefix}.{module}" for module in later if f"{prefix}.{module}" in imported]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    assert wrong_arrows(name_of(path), imports(path)) == []


def test_a_wrong_arrow_is_found() -> None:
    assert wrong_arrows("pairclf.data.tables", {"pairclf.model.batch", "torch", "polars"}) == [
        "pairclf.model.batch",
        "torch",
    ]
    assert wrong_arrows("pairclf.inputs.truncate", {"pairclf.inputs.render"}) == ["pairclf.inputs.render"]
    assert wrong_arrows("pairclf.packaging.build", {"pairclf.rehearsal.mounts"}) == ["pairclf.rehearsal.mounts"]


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["rehearse", "--help"], ["config", "x.yaml"]])
def test_help_and_typing_errors_load_nothing_heavy(command: list[str]) -> None:
    heavy = sorted(HEAVY | {"polars", "sklearn", "scipy", "nbclient"})
    code = (
        "import sys\nfrom pairclf.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("LOADED []"), result.stdout + result.stderr


def test_every_command_shows_an_example() -> None:
    from typer.main import get_command

    from pairclf.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) >= 12
    assert [name for name, command in commands.items() if f"pairclf {name}" not in (command.epilog or "")] == []
