"""Code blocks of the pages: every command parses, every setting resolves, and what can run on a CPU does run.

The line before a block is `<!-- run: FIXTURE -->` or `<!-- needs: a GPU -->` (or an account). A page's blocks run one
after the other, in a folder with the files of FIXTURE. Commands in the text and in tables parse, too.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
import yaml
from support.packages import hollow_wheelhouse
from support.runs import shared_folder
from test_documentation import PAGES, ROOT
from typer.testing import CliRunner

import pairclf
from pairclf.cli import app
from pairclf.cli.options import is_override
from pairclf.config import Config, load_config, override, resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.inference.ensemble import EnsembleFile

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GEMMA = ROOT / "configs/lmsys/gemma2-9b-qlora.yaml"


@dataclass(frozen=True)
class Block:
    """A code block: its language (`text` where none is said), its text, the fixture with which it runs, and what it
    needs that a test has not."""

    page: str
    language: str
    text: str
    fixture: str | None = None
    needs: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks, and indented ones behind a blank line or a mark."""
    name, mark, lines = page.relative_to(ROOT).as_posix(), {}, page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        line, start = lines[at], at
        if fence := re.fullmatch(r"```(\w*)", line):
            at = lines.index("```", at + 1)
            yield Block(name, fence[1] or "text", "\n".join(lines[start + 1 : at]), **mark)
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip() or mark):
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            yield Block(name, "text", "\n".join(line[4:] for line in lines[start : at + 1]).rstrip(), **mark)
        found = re.fullmatch(r"<!-- (run|needs): (.+) -->", line)
        mark = {{"run": "fixture"}.get(found[1], "needs"): found[2]} if found else {}
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


NEEDS = {"a GPU", "an account on Kaggle"}

TESTS = {
    "push": "publish/test_push.py",
    "submit": "publish/test_submit.py",
    "ledger": "publish/test_ledger.py",
    "package": "system/test_chain.py",
    "rehearse": "system/test_chain.py",
    "train": "system/test_chain.py",
    "cv": "system/test_chain.py",
    "evaluate": "system/test_chain.py",
    "predict": "system/test_chain.py",
    "verify": "system/test_chain.py",
    "show": "system/test_chain.py",
    "lengths": "system/test_chain.py",
    "forecast": "inference/test_forecast.py",
    "merge": "approaches/finetune/test_merge.py",
    "export": "approaches/finetune/test_export.py",
    "rank": "inference/test_rank.py",
    "try": "api/test_try.py",
    "report": "reports/test_report_page.py",
    "sweep": "runs/test_sweep.py",
    "compare": "runs/test_compare.py",
    "blend": "runs/test_blend_runs.py",
    "distill": "runs/test_distill.py",
    "pseudo": "runs/test_pseudo.py",
    "config": "system/test_chain.py",
}
"""The tests that run, on small files, the commands of blocks that need something."""

BLOCKS = [block for page in PAGES if page.name != "LOG.md" for block in blocks(page)]


def ids(block: Block) -> str:
    return f"{block.page}:{block.text.splitlines()[0][:40]}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if commands(block)], ids=ids)
def test_commands_of_pages_parse_and_their_settings_resolve(block: Block) -> None:
    for arguments in commands(block):
        check_command(arguments)


SHELL = re.compile(r"^(?:\w+=\S+ )*(?:pairclf|kaggle|hf|accelerate) ", re.MULTILINE)


def test_every_block_runs_or_says_what_it_needs() -> None:
    """Those of the page that is generated from signatures are compared with these."""
    code = [block for block in BLOCKS if SHELL.search(block.text) or block.language == "python"]
    unmarked = [ids(block) for block in code if not (block.fixture or block.needs) and not is_signature(block)]
    assert unmarked == []
    assert {block.needs for block in code} == {None, *NEEDS}
    left = {arguments[0] for block in code if block.needs for arguments in commands(block)}
    assert left - TESTS.keys() == set()
    for command, path in TESTS.items():
        assert re.search(rf"\b{command}\b", (ROOT / "tests" / path).read_text(encoding="utf-8")), command


def is_signature(block: Block) -> bool:
    return block.page == "docs/api.md" and re.match(r"[\w.]+\(", block.text) is not None and block.fixture is None


INLINE = [
    (page.relative_to(ROOT).as_posix(), text)
    for page in PAGES
    if page.name != "LOG.md"
    for text in re.findall(r"`(pairclf [^`]+)`", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", sorted({page for page, _ in INLINE}))
def test_commands_within_text_and_tables_parse(page: str) -> None:
    """In a text they may be without their arguments; in README's table they are whole."""
    for _, text in (found for found in INLINE if found[0] == page):
        arguments = ["1" if argument == "N" else argument for argument in shlex.split(text.replace(" ...", ""))[1:]]
        if arguments[0].isupper() or arguments == ["--help"]:  # pairclf COMMAND --help
            continue
        try:
            check_command(arguments)
        except Exception as error:
            named_alone = type(error).__name__ == "MissingParameter" or "requires an argument" in str(error)
            if not named_alone or (page == "README.md" and len(arguments) > 1):
                raise AssertionError(f"{text}: {error}") from error


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=ids)
def test_python_of_pages_compiles_and_its_names_exist(block: Block) -> None:
    if is_signature(block):
        name = block.text.partition("(")[0].split(".")
        assert getattr(pairclf, name[0], None) is not None or len(name) == 2
        return
    check_python(block.text)


def check_python(text: str) -> None:
    """Raise if what is imported of pairclf, or used as `pairclf.NAME`, does not exist."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pairclf"):
            module = importlib.import_module(str(node.module))
            assert {alias.name for alias in node.names} <= {*dir(module)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pairclf":
            assert node.attr in pairclf.__all__, f"pairclf has no {node.attr}"


def test_a_python_name_that_does_not_exist_is_found() -> None:
    for text in ("import pairclf\npairclf.lod(1)", "from pairclf.inference.serve import Servant"):
        with pytest.raises(AssertionError):
            check_python(text)


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


# --- what runs -------------------------------------------------------------------------------------------------------

CLASSICAL = "configs/lmsys/classical.yaml"
STAND_INS = {
    "lmsys/classical": 1.0,
    "lmsys/gemma2-9b-qlora": 0.3,
    "gemma": 0.3,
    "llama": 0.1,
    "classical": 1.0,
    "kaggle/llm-classification-finetuning-minilm": 0.3,
}
"""Runs that the pages name, by `classical.C` of the classical run that stands for each."""

PLACEHOLDERS = {"CONFIG": CLASSICAL, "FILE": "runs/lmsys/classical/oof.parquet", "YOUR-KAGGLE-NAME": "somebody"}

PYTHON = """
import polars

frame = polars.read_csv("data/lmsys/train.csv")
classes = ["winner_model_a", "winner_model_b", "winner_tie"]
y = labels = [classes[row.index(1)] for row in frame.select(classes).rows()]
prompt, answers = "Why?", ["Because.", "No idea"]
"""
"""What stands before a block that uses these names."""


def call(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}\n{result.exception!r}"


def files(folder: Path) -> None:
    """`configs`, `data/lmsys`, and files of the user's in several forms."""
    (folder / "configs").symlink_to(ROOT / "configs")
    data = folder / "data/lmsys"
    data.mkdir(parents=True)
    write_lmsys(generate(260, seed=1), data, n_test=20)
    train, test = pl.read_csv(data / "train.csv"), pl.read_csv(data / "test.csv")
    for name in ("train", "holdout", "extra"):
        train.write_csv(folder / f"{name}.csv")
    test.write_csv(folder / "test.csv")
    test.write_parquet(folder / "new.parquet")
    (folder / "data/extra").mkdir()
    train.write_ndjson(folder / "data/extra/some.jsonl")
    (folder / "my.yaml").write_text("task: lmsys\ndata: {folder: data, train: ['extra/*.jsonl']}\n")
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    vote = {"winner": "both_bad", "evaluation_order": 1, "conversation_a": talk, "conversation_b": talk}
    pl.DataFrame([{"id": f"vote {row}", **vote} for row in range(3)]).write_parquet(folder / "arena.parquet")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those files and `runs`."""

    def fill(folder: Path) -> None:
        files(folder)
        with chdir(folder):
            for strength in sorted({*STAND_INS.values()}):
                call("cv", CLASSICAL, f"classical.C={strength}", f"output_dir=made/{strength}")
        for name, strength in STAND_INS.items():
            shutil.copytree(folder / f"made/{strength}", folder / "runs" / name)

    return shared_folder(tmp_path_factory, "stand-ins", fill)


def lmsys(folder: Path, _: Path) -> None:
    files(folder)


def runs(folder: Path, stand_ins: Path) -> None:
    shutil.copytree(stand_ins, folder, dirs_exist_ok=True, symlinks=True)


def judge(folder: Path, stand_ins: Path) -> None:
    """`models/judge`, a classical bundle, beside them."""
    runs(folder, stand_ins)
    shutil.copytree(folder / "runs/classical/fold0/bundle", folder / "models/judge")


FIXTURES: dict[str, Callable[[Path, Path], None]] = {"lmsys": lmsys, "runs": runs, "judge": judge}
MARKED = sorted({block.page for block in BLOCKS if block.fixture})
IN_SECONDS = {"docs/leaderboard.md", "docs/production.md"}


@pytest.mark.parametrize(
    "page", [page if page in IN_SECONDS else pytest.param(page, marks=pytest.mark.thorough) for page in MARKED]
)
def test_blocks_marked_to_run_do_run(
    page: str, tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [block for block in BLOCKS if block.page == page and block.fixture]
    (fixture,) = {block.fixture for block in mine}
    FIXTURES[str(fixture)](tmp_path, stand_ins)
    monkeypatch.chdir(tmp_path)
    hollow_wheelhouse(monkeypatch)
    for block in mine:
        if block.language == "python":
            run_python(block.text)
        for arguments in commands(block):
            call(*(path for argument in arguments for path in expanded(argument)))


def run_python(text: str) -> None:
    """As a script where it says so; else as in a notebook."""
    if "__main__" in text:
        Path("block.py").write_text(text)
    command = ["block.py"] if "__main__" in text else ["-c", PYTHON + text]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "report()" not in text or "'both': 1" in done.stdout


def expanded(argument: str) -> list[str]:
    """As a shell does, with files in place of placeholders."""
    for name, value in PLACEHOLDERS.items():
        argument = re.sub(rf"\b{name}\b", value, argument)
    return sorted(map(str, Path().glob(argument))) if "*/" in argument else [argument]
