"""The command line itself: what it does before any command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests_support import make_rows, write_csv
from typer.main import get_command

from pairclf import __version__
from pairclf.cli import app, keep_folder_out
from pairclf.cli.options import split_overrides
from pairclf.task import TASKS


def test_no_process_imports_modules_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -c` is how multiprocessing starts processes, and `python -m` how `--processes` and pip are started."""
    (tmp_path / "struct.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that it is put back
    monkeypatch.delenv("PYTHONSAFEPATH")
    command = [sys.executable, "-c", "import struct"]
    assert subprocess.run(command, check=False).returncode == 3
    keep_folder_out()
    assert subprocess.run(command, check=False).returncode == 0


def test_pairclf_that_is_not_installed_is_found_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import pairclf

    monkeypatch.chdir(Path(pairclf.__file__).parents[1])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
    keep_folder_out()
    assert "PYTHONSAFEPATH" not in os.environ


def test_links_that_lead_to_each_other_are_an_error_and_no_traceback(
    tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "a.yaml")
    code, said = cli("config", tmp_path / "a.yaml")
    assert code == 2
    assert "a.yaml" in said


def test_a_metric_that_the_task_does_not_have_is_refused_before_anything_runs(
    tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: wsdm\n")
    code, printed = cli("config", path, "train.metric_for_best_model=f1")
    assert code == 2
    assert "train.metric_for_best_model='f1' is no metric of a binary task" in printed
    assert "log_loss, accuracy" in printed
    assert cli("config", path, "train.metric_for_best_model=accuracy")[0] == 0


ABSENT = "no-such-file.csv"

WITH_PATHS = {
    "check": [ABSENT],
    "convert": [ABSENT, "--to", "x.parquet"],
    "predict": [ABSENT, "--data", ABSENT],
    "rank": [ABSENT, "--data", ABSENT],
    "try": [ABSENT],
    "forecast": [ABSENT, "--data", ABSENT],
    "package": [ABSENT],
    "distill": [ABSENT, "--to", ABSENT],
}
"""Commands that take several paths, which overrides may lie among, and arguments that they need."""

WITH_CONFIG = {
    "folds": [ABSENT],
    "show": [ABSENT],
    "lengths": [ABSENT],
    "config": [ABSENT],
    "train": [ABSENT],
    "cv": [ABSENT],
    "evaluate": [ABSENT],
    "merge": [ABSENT, "--out", "x"],
    "export": [ABSENT, "--out", "x", "--to", "int8"],
    "pseudo": [ABSENT, "--data", ABSENT, "--scores", ABSENT],
    "sweep": [ABSENT],
    "demo": [],
}


@pytest.mark.parametrize(("command", "arguments"), [*WITH_PATHS.items(), *WITH_CONFIG.items()])
@pytest.mark.parametrize(
    ("option", "form"),
    [
        (["--train.batch-size", "2"], "train.batch_size=VALUE"),
        (["--owner", "me"], "package.owner=VALUE"),
        (["--lr", "1"], "train.learning_rate=VALUE"),
    ],
)
def test_settings_given_as_options_are_refused_with_the_right_form(
    cli: Callable[..., tuple[int, str]], command: str, arguments: list[str], option: list[str], form: str
) -> None:
    code, text = cli(command, *arguments, *option)
    assert code == 2
    assert f"there is no option {option[0].partition('=')[0]}" in text
    assert f"settings are arguments without dashes: {form}" in text


def test_every_command_with_settings_is_tested_above() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    with_settings = {
        name for name, command in commands.items() if any("KEY=VALUE" in str(one.metavar) for one in command.params)
    }
    assert with_settings == {*WITH_PATHS, *WITH_CONFIG}


@pytest.mark.parametrize("arguments", [["verify", "x", "--set", "a=1"], ["train", "x.yaml", "--bogus"]])
def test_other_unknown_options_are_left_to_typer(cli: Callable[..., tuple[int, str]], arguments: list[str]) -> None:
    code, text = cli(*arguments)
    assert code == 2
    assert "No such option" in text


def test_overrides_may_lie_among_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    arguments = ["lr=1", "a/lr=2/bundle", "lr=3", "b", f"inputs.template.system={'x' * 300}", "./lr=4"]
    paths, overrides = split_overrides(arguments)
    assert [str(path) for path in paths] == ["lr=1", "a/lr=2/bundle", "b", "lr=4"]
    assert overrides == [arguments[2], arguments[4]]


@pytest.mark.parametrize("command", WITH_PATHS)
def test_settings_without_a_path_are_an_error(cli: Callable[..., tuple[int, str]], command: str) -> None:
    code, text = cli(command, "seed=1", *WITH_PATHS[command][1:])
    assert code == 2
    assert "seed=1 is a setting, and no path is given" in text


def test_check_names_every_preset(cli: Callable[..., tuple[int, str]]) -> None:
    code, text = cli("check", "--help")
    assert code == 0
    unbroken = re.sub(r"[\s│]", "", text).replace("-", "")
    assert [name for name in TASKS if name.replace("-", "") not in unbroken] == []


def test_version_is_printed(cli: Callable[..., tuple[int, str]]) -> None:
    assert cli("--version") == (0, f"pairclf {__version__}")


TYPOS: dict[str, list[str]] = {
    "verify nosuch": ["no bundle"],
    "predict run/fold0 --data rows.csv": ["below it: run/fold0/bundle"],
    "predict nosuch --data rows.csv": ["no bundle"],
    "predict nosuch --data nosuch.csv": ["no such file"],
    "forecast nosuch --data rows.csv": ["no bundle"],
    "package nosuch": ["there is no config nosuch"],
    "cv configs/lmsys/clasical.yaml": ["there is no config", "the nearest is configs/lmsys/classical.yaml"],
    "runs nosuch": ["no finished training"],
    "train c.yaml --fold 9": ["fold 9 does not exist"],
    "train c.yaml --fold 0 --fold 1": ["takes one fold", "pairclf cv CONFIG --fold 0 --fold 1"],
    "train c.yaml data.train=[nosuch.csv]": ["no such file"],
    "cv c.yaml --fold 0 --fold 9": ["fold 9 does not exist"],
    "cv c.yaml --fold 1 --fold 1": ["a fold twice"],
    "evaluate c.yaml": ["holds no out-of-fold scores", "run `pairclf cv CONFIG` first"],
    "evaluate c.yaml --fold 9": ["fold 9 does not exist"],
    "evaluate c.yaml --fold 0": ["holds no out-of-fold scores", "run `pairclf cv CONFIG` first"],
    "evaluate c.yaml --fold 0 --scores x": ["give only one"],
    "merge c.yaml --out x --fold 1": ["run/fold1/bundle does not exist", "--fold 1` first"],
    "merge c.yaml --out x --average slerp": ["'slerp' is not one of 'exact', 'factors'"],
    "export c.yaml --out x --to int4": ["'int4' is not one of"],
    "export c.yaml --out x --to int8 --fold 9": ["fold 9 does not exist"],
    "export c.yaml --out x --to int8 --bundle nosuch": ["no bundle"],
    "show c.yaml --row nosuch": ["no row has this id"],
    "lengths c.yaml --at many": ["no list of whole numbers"],
    "cv c.yaml model.base=./nosuch": ["model.base=./nosuch is no folder here"],
    "cv c.yaml model.base=run": ["base model folder run holds no config.json"],
    "train c.yaml model.base=embedded:lama-tiny": [
        "not shipped",
        "model.base=embedded:gemma2-tiny or embedded:llama-tiny",
    ],
    "lengths c.yaml --data nosuch.csv": ["no such file"],
    "pseudo c.yaml --data nosuch --scores nosuch": ["no such file"],
}
"""Mistyped commands, and what their errors say."""

MISTYPED = """
import sys
from pairclf.cli import main

for command in sys.argv[1:]:
    print("COMMAND", command, flush=True)
    sys.argv = ["pairclf", *command.split()]
    try:
        main()
    except SystemExit as end:
        print("EXIT", end.code, flush=True)
print("LOADED", [name for name in ("torch", "transformers", "datasets", "scipy", "sklearn") if name in sys.modules])
"""


def test_typing_errors_are_found_before_slow_imports(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", make_rows(6))
    (tmp_path / "c.yaml").write_text("output_dir: run\ndata: {train: rows.csv}\n")
    (tmp_path / "run/fold0/bundle").mkdir(parents=True)
    (tmp_path / "run/fold0/bundle/bundle.json").write_text("{}")
    ended = subprocess.run(
        [sys.executable, "-c", MISTYPED, *TYPOS],
        cwd=tmp_path, env=os.environ | {"COLUMNS": "200"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=True,
    )  # fmt: skip
    *outputs, last = re.split(r"COMMAND |(?=LOADED)", ended.stdout)[1:]
    assert last.strip() == "LOADED []"
    for (command, words), said in zip(TYPOS.items(), outputs, strict=True):
        assert said.startswith(command)
        assert "EXIT 2" in said, said
        assert [part for part in words if part not in " ".join(said.split())] == [], said


def test_settings_are_set_with_an_option_too(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "a.yaml").write_text("task: wsdm\n")
    code, text = cli("config", "--set", "seed=41", tmp_path / "a.yaml", "--set=train.max_steps=7", "train.swap=none")
    assert code == 0
    assert [part for part in ("seed: 41 ", "max_steps: 7 ", 'swap: "none" ') if part not in text] == []
    code, text = cli("config", tmp_path / "a.yaml", "--set", "seed")
    assert (code, "--set seed is no setting" in text) == (2, True)


WAITING = """
import ctypes, os, sys
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from pairclf.cli import main
from pairclf.runs import processes

load, names = float(sys.argv[1]), ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
os.getloadavg = lambda: (load * os.cpu_count(), 0.0, 0.0)
sys.argv[1:] = ["--version"]
try:
    main()
except SystemExit:
    for method in ("forkserver", "spawn"):
        with get_context(method).Pool(1) as pool:
            print(*pool.map(os.getenv, names))
    processes.COMMAND = (sys.executable, "-c", f"import os; print(*map(os.getenv, {names}))")
    processes.run_processes(2, [])
    torch = Path(find_spec("torch").origin).parent
    ctypes.CDLL(next(torch.glob("lib/libgomp*")))  # its OpenMP says on loading how it was set
"""


@pytest.mark.parametrize(
    ("own", "load", "policy", "spins"),
    [
        ({}, 0.4, None, "2000"),
        ({}, 0.6, "passive", None),
        ({"OMP_WAIT_POLICY": "active"}, 0.6, "active", None),
        ({"GOMP_SPINCOUNT": "7"}, 0.6, None, "7"),
    ],
)
def test_threads_spin_while_they_wait_only_on_a_free_machine_or_as_the_environment_says(
    own: dict[str, str], load: float, policy: str | None, spins: str | None
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | own
    command = [sys.executable, "-c", WAITING, str(load)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[1:] == [f"{policy} {spins}"] * 3
    lines = [line.split(" = ")[1].strip("'") for name in names for line in ended.stderr.splitlines() if name in line]
    assert lines == [(policy or "passive").upper(), spins or {"passive": "0"}.get(policy or "", "30000000000")]
