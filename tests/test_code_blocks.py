"""Code blocks of the pages: every command parses, every setting resolves, and what is marked to run does run.

A block runs if the line before it is `<!-- run: FIXTURE -->`: a page's blocks run one after the other, in a folder with
the files of FIXTURE. `UNRUN` says of every other command what its blocks need, and which test runs the command.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_documentation import PAGES, ROOT
from typer.testing import CliRunner

from pairclf.cli import app
from pairclf.cli.options import is_override
from pairclf.config import Config, load_config, override, resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.inference.ensemble import EnsembleFile

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GEMMA = ROOT / "configs/lmsys/gemma2-9b-qlora.yaml"


@dataclass(frozen=True)
class Block:
    """A code block: its language (`text` where none is said), its text, and the fixture with which it runs."""

    page: str
    language: str
    text: str
    fixture: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks, and indented ones behind a blank line or a mark."""
    name, mark, lines = page.relative_to(ROOT).as_posix(), None, page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        line, start = lines[at], at
        if fence := re.fullmatch(r"```(\w*)", line):
            at = lines.index("```", at + 1)
            yield Block(name, fence[1] or "text", "\n".join(lines[start + 1 : at]), mark)
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip() or mark):
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            yield Block(name, "text", "\n".join(line[4:] for line in lines[start : at + 1]).rstrip(), mark)
        found = re.fullmatch(r"<!-- run: (\w+) -->", line)
        mark = found[1] if found else None
        at += 1


def commands(block: Block) -> list[list[str]]:
    """The arguments of each `pairclf` command, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pairclf ")]


def check_command(arguments: Sequence[str]) -> None:
    """Raise if the command line has an option, an argument or a setting that does not exist."""
    name, *others = arguments
    assert name in COMMANDS, f"pairclf has no command {name}"
    with suppress(typer.Exit):  # --help
        COMMANDS[name].make_context(name, list(others))
    if name == "sweep":  # a setting may have several values
        return
    settings = [argument for argument in others if is_override(argument) and not argument.startswith("-")]
    configs = [ROOT / argument for argument in others if argument.startswith("configs/") and argument.endswith(".yaml")]
    for path in configs:
        assert path.is_file(), f"there is no {path.relative_to(ROOT)}"
        if "task" in load_keys(path):
            load_config(path, settings)
    if settings and not configs:
        override(load_config(GEMMA), settings)


def load_keys(path: Path) -> set[str]:
    """The keys of a config; `task` stands in for one that extends another."""
    keys = {*yaml.safe_load(path.read_text(encoding="utf-8"))}
    return keys | {"task"} if "extends" in keys else keys


ACCOUNT = "an account on Kaggle"
WHEELS = "wheels from the registry, minutes"
BASE = "a base model, for most configs a GPU"
FILES = "the reader's own files or runs"
UNRUN: dict[str, tuple[str, str]] = {
    "push": (ACCOUNT, "publish/test_push.py"),
    "submit": (ACCOUNT, "publish/test_submit.py"),
    "ledger": (ACCOUNT, "publish/test_ledger.py"),
    "package": (WHEELS, "system/test_chain.py"),
    "rehearse": (WHEELS, "system/test_chain.py"),
    "train": (BASE, "system/test_chain.py"),
    "cv": (BASE, "system/test_chain.py"),
    "evaluate": (BASE, "system/test_chain.py"),
    "predict": (BASE, "system/test_chain.py"),
    "verify": (BASE, "system/test_chain.py"),
    "show": (BASE, "system/test_chain.py"),
    "lengths": (BASE, "system/test_chain.py"),
    "doctor": ("the reader's machine", "system/test_chain.py"),
    "forecast": (BASE, "inference/test_forecast.py"),
    "merge": (BASE, "approaches/finetune/test_merge.py"),
    "export": (BASE, "approaches/finetune/test_export.py"),
    "rank": (BASE, "inference/test_rank.py"),
    "sweep": (BASE, "runs/test_sweep.py"),
    "compare": (FILES, "runs/test_compare.py"),
    "blend": (FILES, "runs/test_blend_runs.py"),
    "forecast-score": (FILES, "runs/test_score_forecast_runs.py"),
    "suspects": (FILES, "runs/test_suspects.py"),
    "distill": (BASE, "runs/test_distill.py"),
    "pseudo": (FILES, "runs/test_pseudo.py"),
    "check": (FILES, "data/test_audit.py"),
    "convert": (FILES, "data/test_preferences.py"),
    "folds": (FILES, "data/test_folds.py"),
    "config": (FILES, "system/test_chain.py"),
    "runs": (FILES, "test_run.py"),
    "demo": ("minutes", "system/test_demo.py"),
    "example": (FILES, "test_tasks.py"),
}
"""`{command: (what its blocks need, the test that runs it)}`."""

BLOCKS = [block for page in PAGES if page.name != "LOG.md" for block in blocks(page)]


def ids(block: Block) -> str:
    return f"{block.page}:{block.text.splitlines()[0][:40]}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if commands(block)], ids=ids)
def test_commands_of_pages_parse_and_their_settings_resolve(block: Block) -> None:
    for arguments in commands(block):
        check_command(arguments)


def test_every_block_runs_or_says_what_it_needs() -> None:
    """And the command runs elsewhere, on what the test makes."""
    left = {arguments[0] for block in BLOCKS if block.fixture is None for arguments in commands(block)}
    assert left - UNRUN.keys() == set()
    for command, (_, path) in UNRUN.items():
        assert re.search(rf"\b{command}\b", (ROOT / "tests" / path).read_text(encoding="utf-8")), command


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pairclf tarin x.yaml", "no command tarin"),
        ("pairclf check t.csv --exclude", "No such option"),
        ("pairclf cv configs/lmsys/none.yaml", "there is no configs/lmsys/none.yaml"),
        ("pairclf cv configs/lmsys/classical.yaml train.lr=1", "train.lr"),
        ("pairclf predict BUNDLE --data t.csv predict.swop=off", "predict.swop"),
        ("pairclf cv", "config"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, expected: str) -> None:
    with pytest.raises(Exception, match=expected):
        check_command(line.split()[1:])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=ids)
def test_yaml_of_pages_is_a_config(block: Block) -> None:
    """A whole one, or sections of one; or an ensemble's file."""
    tree = yaml.safe_load(block.text)
    if "members" in tree:
        EnsembleFile.model_validate(tree)
        return
    assert tree.keys() <= Config.model_fields.keys() | {"extends"}
    resolve({"task": "lmsys", **{key: value for key, value in tree.items() if key != "extends"}})


def lmsys(folder: Path) -> None:
    """`data/lmsys`, and the configs."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data/lmsys").mkdir(parents=True)
    write_lmsys(generate(260, seed=1), folder / "data/lmsys", n_test=20)


def judge(folder: Path) -> None:
    """`models/judge`, a classical bundle."""
    write_lmsys(generate(120, seed=1), folder, n_test=20)
    settings = [f"data.folder={folder}", f"output_dir={folder}/run"]
    code = CliRunner().invoke(app, ["train", str(ROOT / "configs/lmsys/classical.yaml"), "--fold", "0", *settings])
    assert code.exit_code == 0, code.output
    (folder / "models").mkdir()
    (folder / "run/fold0/bundle").rename(folder / "models/judge")


FIXTURES: dict[str, Callable[[Path], None]] = {"lmsys": lmsys, "judge": judge}
MARKED = sorted({block.page for block in BLOCKS if block.fixture})


@pytest.mark.parametrize("page", MARKED)
def test_blocks_marked_to_run_do_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [block for block in BLOCKS if block.page == page and block.fixture]
    for fixture in dict.fromkeys(block.fixture for block in mine):
        FIXTURES[str(fixture)](tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in mine:
        if block.language == "python":
            (tmp_path / "block.py").write_text(block.text)
            done = subprocess.run([sys.executable, "block.py"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "'both': 1" in done.stdout
        for arguments in commands(block):
            result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
            assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}\n{result.exception!r}"
