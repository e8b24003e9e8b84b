from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import shutil
import sys
import time
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import polars as pl
import pytest
from support.faults import killed_after_a_batch
from support.forked import command as command_of
from support.forked import forked
from support.kernels import make_report
from support.packages import TEST_ROWS, alike, files_of, hollow_wheelhouse, predicted, random_package
from support.runs import random_bundle, run_config

from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import PackagingError
from pairclf.inference.predict import predict
from pairclf.own_files import shipped
from pairclf.packaging.build_record import read_build
from pairclf.packaging.notebook import Value, make_notebook, make_script
from pairclf.rehearsal.gateway import DefaultInferenceServer
from pairclf.rehearsal.report import ScoredRows
from pairclf.rehearsal.result_checks import RunChecks
from pairclf.rehearsal.workspace import workspace
from pairclf.trust import Trust

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
BASE = "google/gemma-2/pyTorch/gemma-2-9b-it/2"
VALUES: dict[str, Value] = {
    "title": "a-notebook",
    "version": "0.1.0",
    "competition": "lmsys-chatbot-arena",
    "landmark": "sample_submission.csv",
    "base": "",
    "bundles": ["fold0-01234567", "fold1-89abcdef"],
    "members": ["ensemble-0123.yaml"],
    "standalone": [],
    "bundle_table": "| `fold0` | fold 0 |\n| `fold1` | fold 1 |",
    "pythons": [HERE],
    "requirements": {HERE: ["pairclf==0.1.0"]},
    "parts": {"bundle": {}, "wheels": {}},
    "wheelhouse": "wheels-0",
    "prior": {"winner_model_a": "0.5", "winner_model_b": "0.3", "winner_tie": "0.2"},
    "settings": [],
    "ids": ["id", "id"],
    "trust": [],
    "note_of_trust": "",
    "gpus": 2,
    "deadline": 30600.0,
    "limit": 32400.0,
    "rows": 25_000,
}
LMSYS = "id,winner_model_a,winner_model_b,winner_tie\n7,0.3,0.3,0.4\n3,0.3,0.3,0.4\n"
TEMPLATE = shipped("kaggle/notebook.py").read_text(encoding="utf-8")


def real(tag: str = "submission", changed: Mapping[str, Value] | None = None) -> str:
    return make_notebook(TEMPLATE, {**VALUES, **(changed or {})}, tag)


def cells(notebook: str) -> dict[str, str]:
    found = nbformat.reads(notebook, as_version=4).cells
    return {str(cell.id): str(cell.source) for cell in found if cell.cell_type == "code"}


# --- as text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["submission", "server"])
@pytest.mark.parametrize("make", [make_notebook, make_script])
def test_same_bytes_each_time_and_nothing_left_to_fill_in(make: Callable[..., str], tag: str) -> None:
    made = make(TEMPLATE, VALUES, tag)
    assert made == make(TEMPLATE, VALUES, tag)
    assert not re.search(r"\{\{\w+\}\}", made)
    assert ("DefaultInferenceServer" in made) == (tag == "server")
    assert ('"predict"' in made.replace("\\", "")) == (tag == "submission")


def test_each_cell_is_python_and_has_an_id_of_its_own() -> None:
    every = nbformat.reads(real(), as_version=4).cells
    assert len({cell.id for cell in every}) == len(every)
    assert list(cells(real())) == ["check", "install", "verify", "predict", "look"]
    assert list(cells(real("server"))) == ["check", "install", "verify", "serve"]
    for source in cells(real()).values():
        ast.parse(source)
        assert not re.search(r"^[!%]", source, re.MULTILINE), "the failure of !pip does not stop a notebook"


def test_script_is_the_notebook_with_its_words_as_comments() -> None:
    script = make_script(TEMPLATE, VALUES, "submission")
    assert re.findall(r"^# %% ([a-z][a-z-]*)$", script, re.MULTILINE) == list(cells(real()))
    assert all(source in script for source in cells(real()).values())
    ast.parse(script)
    assert "# | `fold1` | fold 1 |" in script


def test_values_arrive_in_code_as_python_whatever_they_hold() -> None:
    odd = ['a"b', "c\\d", "é\n"]
    seen: dict[str, Any] = {}
    exec(cells(make_notebook('# %% one\nX = "{{x}}"\nY = "{{y}}"\n', {"x": odd, "y": {"a": odd}}, ""))["one"], seen)
    assert (seen["X"], seen["Y"]) == (odd, {"a": odd})


def test_template_without_a_value_or_a_cell_is_refused() -> None:
    with pytest.raises(PackagingError, match="colour"):
        make_notebook('# %% first\nprint("{{colour}}")\n', {}, "submission")
    with pytest.raises(PackagingError, match="no cell"):
        make_notebook("print()\n", {}, "submission")


# --- the first cell --------------------------------------------------------------------------------------------------


class Inputs:
    """Mounts that the first cell finds, and their hashes."""

    def __init__(self, root: Path, layout: str, patch: pytest.MonkeyPatch, spread: bool = False) -> None:
        self.root, self.layout, self.patch = root, layout, patch
        patch.setenv("PAIRCLF_KAGGLE_INPUT", str(root))
        self.competition = root / {"flat": "lmsys-chatbot-arena", "typed": "competitions/lmsys-chatbot-arena"}[layout]
        self.base = root / {"flat": "", "typed": "models/google"}[layout] / "gemma-2/pytorch/gemma-2-9b-it/2"
        self.parts: dict[str, dict[str, str]] = {"bundle": {}, "wheels": {}}
        self.write(self.competition / "sample_submission.csv", LMSYS)
        self.write(self.competition / "test.csv", "id\n7\n3\n")
        self.write(root / "another-competition" / "sample_submission.csv", "id,x\n1,2\n")
        self.dataset("wheels", "a-wheels", {"wheels-0/one.whl": "a wheel"})
        files = {"fold0-01234567/config.yaml": "one", "fold1-89abcdef/config.yaml": "two"}
        for number, (name, text) in enumerate(files.items() if spread else [("", "")], 1):
            self.dataset("bundle", f"a-bundle-{number}", {name: text} if spread else files)

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def dataset(self, payload: str, slug: str, files: dict[str, str]) -> None:
        folder = self.root / {"flat": slug, "typed": f"datasets/someone/{slug}"}[self.layout]
        for name, text in files.items():
            self.write(folder / name, text)
        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
        text = json.dumps({"payload": payload, "part": 1, "files": hashes})
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.write(folder / f"pairclf-{payload}-{digest[:12]}.json", text)
        self.parts[payload][f"pairclf-{payload}-{digest[:12]}.json"] = digest

    def write_base(self) -> None:
        self.write(self.base / "config.json", "{}")
        self.write(self.base / "model.safetensors", "weights")

    def one(self, name: str) -> Path:
        return next(self.root.rglob(name))


class Waits:
    """A clock that the kernel's waits turn, and nothing else; what has to happen meanwhile happens while it waits.

    Attributes:
        slept: seconds of each wait so far.
        during: called at each wait, with how many there were.
    """

    def __init__(self) -> None:
        self.now = 1e9
        self.slept: list[float] = []
        self.during: Callable[[int], object] = lambda count: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.during(len(self.slept))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    made = Waits()
    monkeypatch.setattr(time, "sleep", made.sleep)
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


@pytest.fixture(params=["flat", "typed"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: Waits) -> Inputs:
    (tmp_path / "working").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return Inputs(tmp_path / "input", request.param, monkeypatch)


def check(inputs: Inputs, *, rerun: bool = False, speed: int = 3000, **changed: Value) -> dict[str, Any]:
    """Run the first cell; returns its names."""
    seen: dict[str, Any] = {}
    source = cells(real(changed={**changed, "parts": inputs.parts}))["check"]
    with inputs.patch.context() as patch:
        patch.setenv("PAIRCLF_CLOCK_SPEED", str(speed))
        patch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)
        if rerun:
            patch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
        exec(compile(source, "check", "exec"), seen)
    return seen


def test_inputs_are_found_in_each_layout_and_priors_written(inputs: Inputs) -> None:
    inputs.write_base()
    seen = check(inputs, base=BASE)
    assert (seen["bundles"] / "fold0-01234567" / "config.yaml").read_text() == "one"
    assert (seen["wheels"] / "wheels-0" / "one.whl").read_text() == "a wheel"
    assert seen["base"] == inputs.base
    assert seen["competition"] == inputs.competition
    assert seen["lacking"] == []
    assert Path("submission.csv").read_text() == (
        "id,winner_model_a,winner_model_b,winner_tie\n7,0.5,0.3,0.2\n3,0.5,0.3,0.2\n"
    )


def test_priors_of_a_task_with_labels(inputs: Inputs) -> None:
    inputs.write(inputs.competition / "sample_submission.csv", "id,winner\nx,model_a\ny,model_a\n")
    check(inputs, prior={"model_a": "0.4", "model_b": "0.6", "winner": "model_b"})
    with open("submission.csv", newline="") as stream:
        assert list(csv.DictReader(stream)) == [{"id": one, "winner": "model_b"} for one in "xy"]


def test_no_priors_are_written_for_a_sample_whose_quotes_take_rows_along(inputs: Inputs) -> None:
    inputs.write(inputs.competition / "sample_submission.csv", 'id,winner\n"x \\" y",a\nz,a\n"u \\" v",a\n')
    with pytest.raises(csv.Error, match="expected after"):
        check(inputs, prior={"winner": "model_b"})


def test_parts_come_together_and_an_older_build_beside_them_is_no_harm(tmp_path: Path, inputs: Inputs) -> None:
    spread = Inputs(tmp_path / "other", inputs.layout, inputs.patch, spread=True)
    marker = spread.one("pairclf-bundle-*.json")
    spread.write(marker.with_name("pairclf-bundle-000000000000.json"), '{"files": {"old/config.yaml": "0"}}')
    assert len(spread.parts["bundle"]) == 2
    seen = check(spread)
    assert sorted(path.name for path in seen["bundles"].iterdir()) == ["fold0-01234567", "fold1-89abcdef"]


def test_base_model_may_be_a_dataset_and_is_waited_for_until_whole(inputs: Inputs) -> None:
    folder = inputs.root / {"flat": "gemma", "typed": "datasets/someone/gemma"}[inputs.layout]
    inputs.write(folder / "config.json", "{}")
    index = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    inputs.write(folder / "model.safetensors.index.json", index)
    inputs.write(folder / "two.safetensors", "weights")
    with pytest.raises(RuntimeError, match="base model someone/gemma"):
        check(inputs, base="someone/gemma")
    inputs.write(folder / "one.safetensors", "")
    with pytest.raises(RuntimeError, match="with all of its weights"):
        check(inputs, base="someone/gemma")
    inputs.write(folder / "one.safetensors", "weights")
    assert check(inputs, base="someone/gemma")["base"] == folder


def test_mount_that_fills_late_is_waited_for(inputs: Inputs, waits: Waits, capsys: pytest.CaptureFixture[str]) -> None:
    late, hidden = inputs.one("fold1-*"), inputs.root.parent / "hidden"
    late.rename(hidden)
    waits.during = lambda count: count == 8 and hidden.rename(late)
    seen = check(inputs)
    assert len(waits.slept) > 8
    assert seen["lacking"] == []
    assert "waiting for the bundle" in capsys.readouterr().out


@pytest.mark.parametrize("rerun", [False, True])
def test_changed_file_and_other_python_stop_every_run_and_are_named(inputs: Inputs, rerun: bool) -> None:
    with pytest.raises(RuntimeError, match=rf"wheels are for Python \['3\.99'\], and this image has {HERE}"):
        check(inputs, rerun=rerun, pythons=["3.99"])
    inputs.write(inputs.one("fold1-*") / "config.yaml", "twp")
    with pytest.raises(RuntimeError, match=r"fold1-89abcdef/config\.yaml was changed"):
        check(inputs, rerun=rerun)


@pytest.mark.parametrize("missing", ["base", "bundle", "wheels", "marker"])
def test_input_that_never_comes_stops_a_saved_run_and_leaves_the_rerun_its_priors(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    base = BASE if missing == "base" else ""
    what = {"base": "base model", "bundle": "the bundle", "wheels": "the wheels", "marker": "the wheels"}[missing]
    if missing == "marker":
        inputs.one("pairclf-wheels-*.json").write_text("{}")  # another build's: its hash is another
    elif missing != "base":
        inputs.one({"bundle": "config.yaml", "wheels": "one.whl"}[missing]).unlink()
    with pytest.raises(RuntimeError, match=what):
        check(inputs, base=base)
    seen = check(inputs, rerun=True, base=base)
    assert len(seen["lacking"]) == 1
    assert what in seen["lacking"][0]
    assert "WARNING" in capsys.readouterr().out
    assert Path("submission.csv").read_text().count("0.5,0.3,0.2") == 2


def test_rerun_without_base_model_has_the_bundles_that_need_none(inputs: Inputs) -> None:
    seen = check(inputs, rerun=True, base=BASE, standalone=["fold1-89abcdef"])
    assert (seen["lacking"], seen["MEMBERS"]) == ([], ["fold1-89abcdef"])
    inputs.write_base()
    seen = check(inputs, rerun=True, base=BASE, standalone=["fold1-89abcdef"])
    assert seen["MEMBERS"] == ["ensemble-0123.yaml"]


def test_what_is_served_is_the_only_submission(inputs: Inputs) -> None:
    """Kaggle's gateway may write submission.parquet beside one of ours."""
    inputs.write(inputs.competition / "kaggle_evaluation" / "__init__.py", "")
    assert check(inputs, landmark="kaggle_evaluation")["competition"] == inputs.competition
    assert not Path("submission.csv").exists()


def test_file_that_is_listed_and_can_not_be_read_yet_is_waited_for(inputs: Inputs, waits: Waits) -> None:
    sample, kept = inputs.competition / "sample_submission.csv", inputs.root.parent / "kept.csv"
    sample.rename(kept)
    sample.symlink_to(inputs.root / "later.csv")
    waits.during = lambda count: count == 2 and kept.rename(inputs.root / "later.csv")
    assert check(inputs)["lacking"] == []
    assert "0.5,0.3,0.2" in Path("submission.csv").read_text()
    assert len(waits.slept) > 2


def test_without_the_competition_no_run_can_go_on(inputs: Inputs) -> None:
    (inputs.competition / "sample_submission.csv").unlink()
    with pytest.raises(RuntimeError, match="no input holds lmsys-chatbot-arena"):
        check(inputs, rerun=True)


@pytest.mark.parametrize("late", ["test.csv", "sample_submission.csv"])
def test_competition_is_waited_for_until_it_is_whole(
    inputs: Inputs, waits: Waits, capsys: pytest.CaptureFixture[str], late: str
) -> None:
    text = (inputs.competition / late).read_text()
    (inputs.competition / late).unlink()
    inputs.write(inputs.competition / "test.csv.gz", "what comes first")
    inputs.write(inputs.competition / "examples" / "sample_submission.csv", "id,winner_model_a\n1,1\n")
    inputs.write(inputs.competition / "examples" / "test.csv", "id\n1\n")
    waits.during = lambda count: count == 4 and inputs.write(inputs.competition / late, text)
    seen = check(inputs, speed=20)  # a look each 0.05 s, and a file is still after a second
    assert (seen["competition"], seen["test"]) == (inputs.competition, inputs.competition / "test.csv")
    assert seen["lacking"] == []
    assert Path("submission.csv").read_text().count("0.5,0.3,0.2") == 2
    assert "waiting for the" in capsys.readouterr().out


def test_sample_below_the_competition_is_taken_where_none_lies_at_the_top(inputs: Inputs) -> None:
    inputs.write(inputs.competition / "data" / "nested" / "sample_submission.csv", "id,winner_tie\n1,1\n")
    for name in ("sample_submission.csv", "test.csv"):
        (inputs.competition / name).rename(inputs.competition / "data" / name)
    seen = check(inputs, competition="LMSYS-Chatbot-Arena")
    assert seen["competition"] == inputs.competition / "data"


@pytest.mark.parametrize("text", ["", "no,header\n"])
def test_sample_that_never_becomes_one_is_named(inputs: Inputs, text: str) -> None:
    inputs.write(inputs.competition / "sample_submission.csv", text)
    with pytest.raises(RuntimeError, match=r"with a sample_submission\.csv that is whole; found: \['.*lmsys-chatbot"):
        check(inputs)


def test_what_still_changes_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    monkeypatch.setenv("PAIRCLF_CLOCK_SPEED", "100")
    sizes = iter([None, 1, 2, 3, 3, 4])
    assert check_names(tmp_path, rerun=True)["wait_for"]("it", lambda: next(sizes)) == 3


def test_rerun_without_test_rows_keeps_its_priors(inputs: Inputs) -> None:
    (inputs.competition / "test.csv").unlink()
    with pytest.raises(RuntimeError, match="no test rows"):
        check(inputs)
    assert "no test rows" in check(inputs, rerun=True)["lacking"][0]
    assert Path("submission.csv").read_text().count("0.5,0.3,0.2") == 2


def test_file_that_is_being_written_is_waited_for_while_it_grows(inputs: Inputs, waits: Waits) -> None:
    still = 20 / 200  # seconds, after which a file that has not grown is no longer being written
    file = inputs.one("fold1-*") / "config.yaml"
    inputs.write(file, "")
    ends = iter(("t", "tw", "two"))
    waits.during = lambda count: waits.slept[-1] == still and inputs.write(file, next(ends))
    seen = check(inputs, speed=200)
    assert next(ends, None) is None, "it was looked at each time that it had grown"
    assert (seen["bundles"] / "fold1-89abcdef" / "config.yaml").read_text() == "two"


@pytest.mark.parametrize("spoil", ["missing", "damaged"])
def test_of_two_copies_the_whole_one_is_taken(inputs: Inputs, spoil: str) -> None:
    copy = inputs.root / "0-an-older-mount"
    shutil.copytree(inputs.one("fold0-*").parent, copy)
    if spoil == "missing":
        (copy / "fold1-89abcdef" / "config.yaml").unlink()
    else:
        inputs.write(copy / "fold1-89abcdef" / "config.yaml", "twp")
    seen = check(inputs)
    assert (seen["bundles"] / "fold1-89abcdef" / "config.yaml").read_text() == "two"
    assert seen["lacking"] == []


def test_base_model_of_shards_waits_for_its_index(inputs: Inputs) -> None:
    inputs.write(inputs.base / "config.json", "{}")
    inputs.write(inputs.base / "model-00001-of-00002.safetensors", "one")
    with pytest.raises(RuntimeError, match="with all of its weights"):
        check(inputs, base=BASE)
    inputs.write(inputs.base / "model-00002-of-00002.safetensors", "two")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    inputs.write(inputs.base / "model.safetensors.index.json", json.dumps({"weight_map": names}))
    assert check(inputs, base=BASE)["base"] == inputs.base


# --- the others ------------------------------------------------------------------------------------------------------


class Later:
    """The cells after the first, with commands that end as they are told to."""

    def __init__(self, folder: Path, rerun: bool) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.codes: dict[str, list[int]] = {}
        self.names = check_names(folder, rerun)
        self.names["run"] = self.run

    def run(self, *command: Any, seconds: float = 0) -> int:
        self.calls.append(tuple(map(str, command)))
        codes = self.codes.get(str(command[1]), [])
        return codes.pop(0) if codes else 0

    def run_cells(self, *names: str) -> None:
        for name in names:
            exec(cells(real("server" if name == "serve" else "submission"))[name], self.names)

    def count(self, name: str) -> int:
        return sum(call[1] == name for call in self.calls)


def check_names(folder: Path, rerun: bool) -> dict[str, Any]:
    """What the first cell leaves."""
    seen: dict[str, Any] = {}
    head = cells(real())["check"].partition("python = check_machine()")[0]
    exec(head, seen)
    places = {"competition": folder, "test": folder / "test.csv", "bundles": folder, "wheels": folder, "base": None}
    seen.update(places, sample=folder / "s.csv", RERUN=rerun, python=HERE)
    return seen


@pytest.mark.parametrize("killed", [-9, 137])
def test_killed_predict_is_started_again_and_goes_on(tmp_path: Path, killed: int) -> None:
    later = Later(tmp_path, rerun=True)
    later.codes["predict"] = [killed, killed]
    later.run_cells("verify", "predict")
    assert later.count("predict") == 3
    assert later.names["lacking"] == []
    assert later.calls[-1][2] == str(tmp_path / "ensemble-0123.yaml")
    assert "--resume" not in later.calls[-1], "it is what `predict` does by itself"


def test_predict_is_not_started_for_ever_nor_after_the_deadline(tmp_path: Path) -> None:
    later = Later(tmp_path, rerun=True)
    later.codes["predict"] = [-9] * 99
    later.run_cells("verify", "predict")
    assert later.count("predict") == 6
    assert later.names["lacking"]
    late = Later(tmp_path, rerun=True)
    late.codes["predict"] = [-9] * 99
    late.names["STARTED"] -= 40_000
    late.run_cells("verify", "predict")
    assert late.count("predict") == 1


def test_failures_stop_a_saved_run_and_are_warnings_in_the_rerun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("verify", "predict"):
        saved, rerun = Later(tmp_path, rerun=False), Later(tmp_path, rerun=True)
        for later in (saved, rerun):
            later.codes[command] = [3]
        rerun.run_cells("verify", "predict")
        assert rerun.count("predict") == 1, "a bundle that can't be loaded is left out by predict itself"
        assert "WARNING" in capsys.readouterr().out
        with pytest.raises(RuntimeError, match="says w"):
            saved.run_cells("verify", "predict")


def test_deadline_is_counted_from_the_first_second(tmp_path: Path) -> None:
    later = Later(tmp_path, rerun=True)
    later.names["STARTED"] = 0.0
    later.run_cells("verify", "predict")
    assert later.calls[-1][later.calls[-1].index("--deadline") + 1] == "1970-01-01T08:30:00+00:00"


def command() -> Any:
    """The cells' `run`."""
    seen: dict[str, Any] = {}
    exec(cells(real())["check"].partition("python = check_machine()")[0], seen)
    seen["lacking"] = ["all"]
    exec(cells(real())["install"], seen)
    return seen["run"]


def test_run_tells_the_exit_code() -> None:
    assert command()("json.tool", "--help") == 0
    assert command()("no_such_module") == 1


def test_commands_get_a_plain_log_and_no_colours(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    printed = "import os; print(*sorted(name for name in os.environ if 'COLOR' in name))"
    assert command()("timeit", "-n", "1", "-r", "1", printed) == 0
    assert capfd.readouterr().out.splitlines()[0] == "NO_COLOR"


def test_command_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRCLF_CLOCK_SPEED", "1")
    assert command()("timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)", seconds=0) == -9


def test_predict_that_hangs_has_time_to_end_after_the_deadline(tmp_path: Path) -> None:
    later, given = Later(tmp_path, rerun=True), []

    def note(*command: Any, **options: float) -> int:
        given.append(options)
        return 0

    later.names["run"] = note
    later.run_cells("verify", "predict")
    assert given[1] == {"seconds": 31_500}, "in the middle between the deadline, 30,600, and the limit, 32,400"


@pytest.mark.parametrize(("serves", "rerun", "seconds"), [(False, True, 7650), (True, True, 600), (True, False, 7650)])
def test_verify_that_hangs_leaves_time_to_predict_and_to_serve(
    tmp_path: Path, serves: bool, rerun: bool, seconds: float
) -> None:
    later, given = Later(tmp_path, rerun), []
    later.names["SERVES"] = serves

    def hang(*command: Any, **options: float) -> int:
        given.append(options)
        return -9

    later.names["run"] = hang
    with nullcontext() if rerun else pytest.raises(RuntimeError, match="took too long"):
        later.run_cells("verify")
    assert given == [{"seconds": seconds}]
    assert later.names["lacking"] == []


@pytest.mark.parametrize("text", ["id,a\n1,0.5\nx-2,0.5\n", "id,a\n1,0.5\n99999999999999999999,0.5\n"])
def test_ids_of_any_kind_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    many = text.replace("1,0.5\n", "1,0.5\n" * 200)  # types are told by the first hundred rows
    Path("submission.csv").write_text(many)
    Later(tmp_path, rerun=False).run_cells("look")
    assert "201 rows" in capsys.readouterr().out


@pytest.mark.parametrize("without", ["submission", "polars"])
def test_look_that_fails_does_not_lose_the_rerun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if without == "polars":
        Path("submission.csv").write_text("id,a\n1,0.5\n")
        monkeypatch.setitem(sys.modules, "polars", None)
    Later(tmp_path, rerun=True).run_cells("look")
    assert "WARNING: no look at the submission" in capsys.readouterr().out
    with pytest.raises((ImportError, FileNotFoundError)):
        Later(tmp_path, rerun=False).run_cells("look")


# --- server ----------------------------------------------------------------------------------------------------------


class Gateway:
    """Stands for Kaggle's package: asks for one batch."""

    batch: tuple[Any, ...] = ()
    answers: list[Any]

    def __init__(self, listener: Callable[..., Any]) -> None:
        assert listener.__name__ == "predict", "Kaggle's gateway asks for it by this name"
        self.listener = listener
        Gateway.answers = []

    def serve(self) -> None:
        Gateway.answers.append(self.listener(*self.batch))

    def run_local_gateway(self, paths: tuple[str, ...]) -> None:
        self.serve()


class Model:
    """Stands for `pairclf.inference.serve.Server`."""

    made: list[Model] = []  # noqa: RUF012 - emptied for each test

    def __init__(self, members: list[Path], **options: Any) -> None:
        self.options, self.closed, self.fails = options, False, False
        Model.made.append(self)

    def predict(self, test: Any, *others: Any) -> Any:
        if test["id"][0] < 0:
            raise ValueError("an id below 0")
        return "scored"

    def report(self) -> dict[str, float]:
        return {"rows": 2, "both": 2, "one": 0, "priors": 0, "failed": 0, "batches": 1, "seconds": 0.5}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Gateway]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRCLF_CLOCK_SPEED", "100")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, holds in (
        ("kaggle_evaluation", {}),
        ("kaggle_evaluation.default_inference_server", {"DefaultInferenceServer": Gateway}),
        ("pairclf.inference.serve", {"Server": Model}),
    ):
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    test = pl.DataFrame({"id": [7, 3], "prompt": ["a", "b"]})
    sample = pl.DataFrame({"id": [7, 3], "winner_model_a": [0.0, 0.0], "winner_tie": [1, 1], "winner_model_b": [0, 0]})
    monkeypatch.setattr(Gateway, "batch", (test, sample))
    Model.made = []
    return Gateway


PRIORS = {"id": [7, 3], "winner_model_a": [0.5, 0.5], "winner_tie": [0.2, 0.2], "winner_model_b": [0.3, 0.3]}


def serve(folder: Path, *, rerun: bool, lacking: tuple[str, ...] = ()) -> dict[str, Any]:
    later = Later(folder, rerun)
    later.names["lacking"] = [*lacking]
    later.run_cells("verify", "serve")
    served: dict[str, Any] = json.loads(Path("served.json").read_text())
    return served


def test_server_is_told_the_limits_by_the_clock_and_closed(tmp_path: Path, gateway: type[Gateway]) -> None:
    for rerun in (False, True):
        assert serve(tmp_path, rerun=rerun) == Model([]).report()
        model = Model.made[-2]
        assert model.options["trust"] == Trust(linked_files=True)  # `assemble` linked them
        assert (model.closed, model.options["strict"], model.options["batch_seconds"]) == (True, not rerun, 3.0)
        assert gateway.answers == ["scored"]


@pytest.mark.parametrize("form", ["polars", "pandas", "no sample"])
def test_rerun_without_the_models_serves_priors(
    tmp_path: Path, gateway: type[Gateway], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "pandas":
        monkeypatch.setattr(gateway, "batch", tuple(one.to_pandas() for one in gateway.batch))
    if form == "no sample":
        monkeypatch.setitem(VALUES, "ids", ["row", "id"])
        monkeypatch.setattr(gateway, "batch", (gateway.batch[0].rename({"id": "row"}),))
        (tmp_path / "s.csv").write_text("id,winner_model_a,winner_tie,winner_model_b\n")
    with pytest.raises(RuntimeError, match="nothing can be served"):
        serve(tmp_path, rerun=False, lacking=("base",))
    served = serve(tmp_path, rerun=True, lacking=("base",))
    (answer,) = gateway.answers
    made = {name: list(answer[name]) for name in answer.columns}
    assert (made, list(made)) == (PRIORS, list(PRIORS))
    assert {name: count for name, count in served.items() if count} == {"rows": 2, "priors": 2, "batches": 1}


def test_batch_that_fails_stops_a_saved_run_and_has_the_priors_in_the_rerun(
    tmp_path: Path, gateway: type[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    test, sample = gateway.batch
    monkeypatch.setattr(gateway, "batch", (test.with_columns(-pl.col("id")), sample))
    with pytest.raises(ValueError, match="below 0"):
        serve(tmp_path, rerun=False)
    served = serve(tmp_path, rerun=True)
    assert gateway.answers[0].to_dict(as_series=False) == PRIORS
    assert served["priors"] == 2


def test_models_that_cannot_be_loaded_stop_a_saved_run_and_not_the_rerun(
    tmp_path: Path, gateway: type[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["pairclf.inference.serve"], "Server")
    with pytest.raises(ImportError):
        serve(tmp_path, rerun=False)
    assert serve(tmp_path, rerun=True)["priors"] == 2


def test_serve_cell_gives_the_submission_of_predict(
    tmp_path: Path, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real models, asked by the gateway of rehearsals."""
    write_lmsys(generate(24, seed=1), tmp_path, n_test=8)
    bundle = random_bundle(tmp_path / "fold0-01234567", run_config(tmp_path, base_of("llama")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    server = types.ModuleType("kaggle_evaluation.default_inference_server")
    vars(server)["DefaultInferenceServer"] = partial(DefaultInferenceServer, age=lambda: 0.0)
    for module in (types.ModuleType("kaggle_evaluation"), server):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    later = Later(tmp_path, rerun=False)
    later.names |= {"MEMBERS": [bundle.name], "sample": tmp_path / "sample_submission.csv", "SPEED": 1e-6}
    later.run_cells("verify", "serve")
    predict([bundle], tmp_path / "test.csv", tmp_path / "here.csv", sample=tmp_path / "sample_submission.csv")
    assert json.loads(Path("served.json").read_text())["both"] == 8
    assert alike(Path("submission.csv"), tmp_path / "here.csv", tolerance=1e-5)


# --- all cells -------------------------------------------------------------------------------------------------------


def test_packaged_kernel_of_a_reward_model_goes_on_after_a_kill_to_the_submission_of_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its cells, in this process, with its commands in processes of their own: forked, as each would take
    seconds to import torch. `pytest --thorough` rehearses it in the sandbox, and kills kernels there."""
    hollow_wheelhouse(monkeypatch)
    package = random_package(tmp_path / "top", model={"readout": "reward"}, kernel_type="script")
    build, (test, sample), mounts = read_build(package), files_of(package.parent), tmp_path / "input"
    for part in build.parts:
        shutil.copytree(package / part.folder, mounts / part.folder)
    (mounts / build.package.competition).mkdir()
    for path in (test, sample):
        shutil.copy(path, mounts / build.package.competition)

    commands: list[str] = []

    def call(arguments: list[str], *, env: Mapping[str, str], timeout: float) -> int:
        commands.append(" ".join(arguments[2:4]))
        if arguments[2] == "pip":
            return 0
        run = killed_after_a_batch if commands == ["pip install", "pairclf verify", "pairclf predict"] else command_of
        process = forked(run, *arguments[3:], output=tmp_path / f"{len(commands)}.log")
        process.join(timeout)
        assert process.exitcode is not None
        return process.exitcode

    monkeypatch.setattr("subprocess.call", call)
    monkeypatch.setenv("PAIRCLF_KAGGLE_INPUT", str(mounts))
    monkeypatch.setenv("PAIRCLF_CLOCK_SPEED", "50")
    with workspace() as place:
        monkeypatch.chdir(place.results_folder)
        exec((package / "kernel" / build.code_file).read_text(), {"__name__": "__main__"})
        assert commands == ["pip install", "pairclf verify", "pairclf predict", "pairclf predict"]
        assert "predict was killed (exit code -9)" in capsys.readouterr().out
        assert "sequences are taken from the journal" in (tmp_path / "4.log").read_text()
        scored = RunChecks(build, sample, None, "", sample)
        report = make_report(rows=TEST_ROWS, scored=None, parity=[], passed=False, submission={}, projections=[])
        scored.check(place, report)
        assert report.problems == []
        assert report.scored == ScoredRows(both_orders=TEST_ROWS, one_order=0, prior=0)
        assert alike(predicted(package, tmp_path, [0]), Path("submission.csv"), tolerance=1e-4)
