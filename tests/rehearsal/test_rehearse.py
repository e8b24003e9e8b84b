"""The rehearsal of small kernels that are made here: what they see, what they can't do, and how they are judged.

They are scripts where nothing is about a notebook: Jupyter takes a second to start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import polars as pl
import pytest
from clocks_support import comes_true
from rich.console import Console
from support.forked import forked
from support.kernels import forecast_nothing, rehearse_lightly, use_light_image
from support.records import BUNDLE, make_package, write_package

from pairclf.config import Config, dump_config
from pairclf.errors import PackagingError, PairclfError
from pairclf.files import cache_folder, locked, state_folder
from pairclf.packaging.metadata import Payload
from pairclf.rehearsal import isolated_root, projection, sandbox
from pairclf.rehearsal import rehearse as rehearsal
from pairclf.rehearsal import workspace as stage
from pairclf.rehearsal.image import needed_by
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import RehearsalReport, RehearsalReports, ScoredRows, read_passed
from pairclf.rehearsal.workspace import Workspace
from pairclf.task import hidden_rows

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
FIND = """
import json, os, pathlib, subprocess, sys, time
INPUT = pathlib.Path(os.environ["PAIRCLF_KAGGLE_INPUT"])
def find(name):
    for _ in range(12_000):
        if found := sorted(INPUT.rglob(name)):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"{name} never came")
marker, sample, test = find("pairclf-bundle-*.json"), find("sample_submission.csv"), find("test.csv")
"""
VERIFIED = [{"bundle": BUNDLE, "rows": 4, "largest_difference": 1e-7, "tolerance": 1e-5, "dtype": "float32"}]
PREDICT = f"""
import polars as pl
wanted = pl.read_csv(sample)
wanted.write_csv("submission.csv")
wanted.with_columns(orders=2).write_parquet("scores.parquet")
pathlib.Path("verify.json").write_text({json.dumps(json.dumps(VERIFIED))})
"""


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_image(monkeypatch)
    forecast_nothing(monkeypatch)


@pytest.fixture(params=["namespaces", "guards"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways of keeping the kernel in; the first where this machine allows it."""
    if request.param == "guards":
        monkeypatch.setattr(stage, "namespaces", lambda view, folder, python: None)
    elif not has_namespaces(tmp_path):
        pytest.skip("this machine allows no namespaces")
    return str(request.param)


def has_namespaces(folder: Path, program: Path | None = None) -> bool:
    """Whether the running interpreter, or another program that reads no file, starts in namespaces."""
    top = folder / (program.name if program else "namespaces")
    for name in ("root", "working"):
        (top / name).mkdir(parents=True)
    readable = [] if program else [str(path) for path in needed_by(Path(sys.executable))]
    root, working = str(top / "root"), str(top / "working")
    view = isolated_root.View(root=root, readable=readable, writable=[], working=working, disk=1 << 20)
    return sandbox.namespaces(view, top, program or Path(sys.executable).resolve()) is not None


@pytest.fixture
def competition(tmp_path: Path) -> tuple[Path, Path]:
    test, sample = tmp_path / "rows.csv", tmp_path / "sample.csv"
    test.write_text("id,prompt,response_a,response_b\n7,p,a,b\n3,q,c,d\n")
    thirds = "0.3333333,0.3333333,0.3333334"
    sample.write_text(f"id,winner_model_a,winner_model_b,winner_tie\n7,{thirds}\n3,{thirds}\n")
    return test, sample


Packager = Callable[..., Path]


@pytest.fixture
def packaged(tmp_path: Path, competition: tuple[Path, Path]) -> Packager:
    """`packaged({id: code}, setting=...)`: a package whose kernel has these cells."""

    def make(cells: Mapping[str, str], **settings: object) -> Path:
        package = make_package(**{"python_versions": [RUNNING], "kernel_type": "script", **settings})
        payloads: dict[Payload, dict[str, str]] = {
            "bundle": {f"{BUNDLE}/config.yaml": dump_config(Config())},
            "wheels": {"iniconfig-2.0.0-py3-none-any.whl": "a wheel"},
        }
        test, sample = competition
        return write_package(tmp_path / "package", package, cells, payloads, test=test, sample=sample)

    return make


def run(folder: Path, **options: object) -> RehearsalReport:
    (report,) = rehearse(folder, Options(**options)).runs  # type: ignore[arg-type]
    return report


def results(out: Path) -> list[str]:
    """What lies there beside the lock."""
    return sorted(path.name for path in out.iterdir() if path.name != ".rehearsal.lock")


def stages() -> list[str]:
    """Folders in which rehearsals are, or were."""
    return [path.name for path in (cache_folder() / "rehearsals").iterdir() if path.name != ".lock"]


def render(report: RehearsalReport) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(RehearsalReports([report]).render())
    return captured.get()


PRY = """
import socket
assert "someone" not in os.environ.get("HOME", "") and "SECRET_TOKEN" not in os.environ
assert os.environ["KAGGLE_IS_COMPETITION_RERUN"]
for path in (marker.parent / "new", test):
    try:
        open(path, "a")
        raise SystemExit("the input can be written to")
    except OSError as error:
        print("input:", error.strerror)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=600)
    raise SystemExit("the network can be reached")
except OSError as error:
    print("network:", error)
child = subprocess.run([sys.executable, "-c", "import urllib.request as r; r.urlopen('http://192.0.2.1', timeout=600)"])
assert child.returncode == 1
assert "dataset-metadata.json" not in os.listdir(marker.parent)
"""


@pytest.mark.parametrize(
    ("isolation", "kernel"),
    [("namespaces", "notebook"), ("guards", "script")],
    indirect=["isolation"],
    ids=["namespaces-notebook", "guards-script"],
)
def test_submission_comes_out_and_nothing_else_gets_through(
    packaged: Packager, isolation: str, kernel: str, competition: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    package = packaged({"check": FIND, "pry": PRY, "predict": PREDICT}, kernel_type=kernel)
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in package.rglob("*") if path.is_file()}
    report = run(package, late=0.5)

    out = package / "rehearsal"
    assert pl.read_csv(out / "submission.csv").equals(pl.read_csv(competition[1]))
    assert report.submission["rows"] == report.rows == 2
    network, inputs, working = {
        "namespaces": (
            "namespace of its own (Network is unreachable)", "read-only mount (Read-only file system)",
            "file system of its own",
        ),
        "guards": ("guard on Python's sockets (no network", "no permission to write (Permission denied)", "watched"),
    }[isolation]  # fmt: skip
    assert report.network.startswith(network)
    assert (report.input, report.working) == (inputs, working)
    assert [name for name in report.seconds if name.startswith("cell")] == ["cell check", "cell pry", "cell predict"]
    assert report.seconds["cell check"] >= 0.4, "the first mount was late, and nobody waited for it"
    assert report.files == ("not there (No such file or directory)" if isolation == "namespaces" else "not hidden")
    assert report.memory_peak > 10e6
    assert report.disk_peak > 100
    assert report.python.startswith(RUNNING)
    assert report.layouts == ["typed", "flat"]
    assert report.scored is not None
    assert (report.scored.both_orders, report.scored.prior) == (2, 0)
    assert read_passed(package) == report
    assert "passed" in render(report)
    left = ["report.json", "scores.parquet", "submission.csv"]
    assert results(out) == sorted([*left, "executed.ipynb" if kernel == "notebook" else "executed.log"])
    assert (
        before.items()
        <= {path: (path.read_bytes(), path.stat().st_mode) for path in package.rglob("*") if path.is_file()}.items()
    )


def failing(package: Path, **options: object) -> tuple[str, RehearsalReport]:
    with pytest.raises(PackagingError, match="did not end as it must") as caught:
        run(package, layouts=("flat",), late=0.1, **options)
    out = options.get("out", package / "rehearsal")
    assert isinstance(out, Path)
    with pytest.raises(PackagingError, match=r"did not pass|never rehearsed"):
        read_passed(package)
    (written,) = out.glob("report*.json")
    return str(caught.value), RehearsalReport.model_validate_json(written.read_text())


@pytest.mark.parametrize("kernel", ["notebook", "script"])
def test_failing_cell_is_told_with_its_own_words(packaged: Packager, kernel: str) -> None:
    code = "subprocess.check_call([sys.executable, '-c', 'import sys; sys.exit(\"the head has 5 classes\")'])"
    said, report = failing(packaged({"check": FIND, "score": code, "never": "1"}, kernel_type=kernel))
    assert "the cell score failed" in said
    assert "the head has 5 classes" in said
    assert report.failed == "score"
    assert "cell never" not in report.seconds


def test_dead_kernel_is_a_failed_cell(packaged: Packager) -> None:
    assert (
        "the cell score failed" in failing(packaged({"check": FIND, "score": "os._exit(9)"}, kernel_type="notebook"))[0]
    )


def test_rehearse_tells_all_that_does_not_pass(packaged: Packager) -> None:
    """What there can be, test_result_checks.py has."""
    predict = PREDICT.replace("orders=2", "orders=0").replace("1e-07", "0.5")
    said, _ = failing(packaged({"check": FIND, "predict": predict}))
    assert "2 of 2 rows have nothing but the prior" in said
    assert f"logits of {BUNDLE} differ by 0.5; 1e-05 is allowed" in said


def test_what_takes_too_long_does_not_pass(packaged: Packager) -> None:
    said, _ = failing(
        packaged({"check": FIND, "predict": PREDICT + "time.sleep(1.5)"}, time_limit_hours=302 / 3600, deadline="1s"),
        speed=300,
    )
    assert "the kernel took" in said
    assert "the competition's limit is 302 s" in said


def test_deadline_that_the_hidden_rows_would_miss_does_not_pass(
    packaged: Packager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "hidden_rows", hidden_rows)
    said, report = failing(packaged({"check": FIND, "predict": PREDICT + "time.sleep(1)"}, deadline="1h"))
    assert "25,000 rows take" in said
    assert report.projections[0].judged
    assert report.projections[0].predict >= 12_500


def test_memory_limit_ends_the_largest_process(packaged: Packager) -> None:
    child = "import time; held = bytearray([1]) * 700_000_000; time.sleep(600)"
    code = f"subprocess.check_call([sys.executable, '-c', '{child}'])"
    said, report = failing(packaged({"check": FIND, "predict": code}), memory_gb=0.6)
    assert "in a memory of 0.60 GB: killed the largest process" in said
    assert report.failed == "predict", "the kernel itself went on, and saw its child die"
    assert report.memory_peak > 0.6e9


def test_working_folder_has_the_limit(packaged: Packager, isolation: str) -> None:
    code = "open('big', 'wb').write(bytes(30_000_000))\ntime.sleep(600)"
    said, report = failing(packaged({"check": FIND, "predict": code}), disk_gb=0.01)
    assert report.failed == "predict"
    assert ("No space left on device" if isolation == "namespaces" else "in a working folder of 0.01 GB") in said


def test_sandbox_that_does_not_hold_is_refused(packaged: Packager, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = sandbox.Sandbox((), "nothing", "nothing", "nothing", "nothing", guarded=False)
    monkeypatch.setattr(stage, "namespaces", lambda view, folder, python: nothing)
    with pytest.raises(PackagingError, match="the sandbox is open"):
        run(packaged({"check": FIND, "predict": PREDICT}))


def test_older_results_of_another_outcome_do_not_stay(packaged: Packager) -> None:
    package = packaged({"check": FIND, "predict": PREDICT})
    out = package / "rehearsal"
    run(package, layouts=("flat",), late=0.1)
    failing(packaged({"check": FIND, "score": "1"}))
    assert results(out) == ["executed.log", "report.json"]


def test_folder_that_is_no_package(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(PackagingError, match="is no package"):
            rehearse(folder, Options())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"test": Path("nowhere.csv")}, r"nowhere\.csv"),
        ({"inject": ("flood",)}, r"--inject flood: no such fault[\s\S]*oom"),
        ({"inject": ("oom",), "commit": True}, "--inject and --commit"),
        ({"layouts": ("round",)}, "layouts="),
        ({"image": "3.99"}, r"has Python 3\.99, and the package is for"),
    ],
)
def test_options_that_can_not_be_had(packaged: Packager, options: dict[str, object], says: str) -> None:
    with pytest.raises(PackagingError, match=says):
        run(packaged({"check": FIND}), **options)


def test_attached_base_model_is_found_in_every_layout(packaged: Packager, tmp_path: Path) -> None:
    cells = {"check": FIND + "find('config.json')\nprint([*INPUT.rglob('config.json')])", "predict": PREDICT}
    package = packaged(cells, base_model_source="google/gemma-2/transformers/gemma-2-9b-it/2")
    with pytest.raises(PackagingError, match=r"gemma-2-9b-it/2, and no folder was given for it[\s\S]*--base"):
        run(package)
    base = tmp_path / "some" / "model"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    assert run(package, base=base, late=0.1).passed


def test_saved_notebook_is_no_rerun(packaged: Packager) -> None:
    code = FIND + "assert 'KAGGLE_IS_COMPETITION_RERUN' not in os.environ"
    package = packaged({"check": code, "predict": PREDICT})
    report = run(package, commit=True, layouts=("flat",), late=0.1)
    assert not report.rerun
    assert (package / "rehearsal" / "submission-trial.csv").is_file()
    assert not (package / "rehearsal" / "report.json").exists(), "a trial takes no other's place"


def test_hidden_size_under_an_accelerated_clock(packaged: Packager) -> None:
    code = FIND + "print(os.environ['PAIRCLF_CLOCK_SPEED'])\nassert os.environ['PAIRCLF_CLOCK_SPEED'] == '1.5'"
    report = run(packaged({"check": code, "predict": PREDICT}), rows=500, speed=1.5, layouts=("flat",), late=0.1)
    assert report.rows == report.submission["rows"] == 500
    assert "at 1.5x" in render(report)


def test_server_gets_a_gateway_to_ask_it_and_tells_what_it_scored(packaged: Packager) -> None:
    code = FIND + "print(find('default_inference_server.py').parent.name)\nfind('__init__.py')"
    served = {"rows": 2, "both": 1, "one": 1, "priors": 0, "failed": 0, "batches": 1, "seconds": 1.0}
    serve = PREDICT.replace('wanted.with_columns(orders=2).write_parquet("scores.parquet")', "")
    serve += f"pathlib.Path('served.json').write_text({json.dumps(served)!r})"
    package = packaged({"check": code, "serve": serve}, kernel_type="server")
    report = run(package, layouts=("flat",), late=0.1)
    assert report.scored == ScoredRows(both_orders=1, one_order=1, prior=0)
    assert read_passed(package) == report


def test_submission_that_a_later_cell_removes_is_no_submission(packaged: Packager) -> None:
    cells = {"check": FIND, "predict": PREDICT, "clear": "pathlib.Path('submission.csv').unlink()"}
    assert "there is no submission" in failing(packaged(cells))[0]


def test_submission_of_another_layout_is_not_this_ones(packaged: Packager) -> None:
    early = PREDICT.replace("wanted.write_csv", "'datasets' in marker.parts and wanted.write_csv")
    with pytest.raises(PackagingError, match=r"there is no submission\.csv"):
        run(packaged({"check": FIND + early, "predict": "1"}), late=0.1)


def test_package_that_was_changed_is_not_rehearsed(packaged: Packager) -> None:
    package = packaged({"check": FIND, "predict": PREDICT})
    (package / "bundle" / BUNDLE / "config.yaml").write_text("seed: 7\n")
    with pytest.raises(PackagingError, match=r"config\.yaml was changed since"):
        run(package)


def test_a_sample_of_other_rows_is_refused_before_the_notebook(
    packaged: Packager, competition: tuple[Path, Path]
) -> None:
    package = packaged({"check": FIND, "predict": PREDICT})
    test, sample = competition
    lines = test.read_text().splitlines()
    test.write_text("\n".join([lines[0], *lines[2:]]))
    dropped = lines[1].split(",")[0]
    with pytest.raises(PackagingError, match=rf"{sample.name} has 1 id that .*{test.name} has not, such as {dropped}"):
        run(package)


def test_no_rows_are_nothing_to_rehearse_with(packaged: Packager, competition: tuple[Path, Path]) -> None:
    package = packaged({"check": FIND, "predict": PREDICT})
    competition[0].write_text("id,prompt,response_a,response_b\n")
    with pytest.raises(PackagingError, match=r"rows\.csv has no rows"):
        run(package, rows=25)
    competition[0].write_text("")
    with pytest.raises(PackagingError, match=r"rows\.csv can't be read"):
        run(package)


def test_image_is_the_first_that_the_package_is_for(packaged: Packager, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def furnish(stage: Workspace, image: str, *others: object) -> None:
        asked.append(image)
        sys.exit()

    monkeypatch.setattr(rehearsal, "build_image", furnish)
    for pythons in (["3.99", RUNNING], ["3.99", "3.98"]):
        with pytest.raises(SystemExit):
            run(packaged({"check": FIND}, python_versions=pythons))
    assert asked == ["here", "3.99"]


def test_second_rehearsal_in_a_folder_waits(packaged: Packager, monkeypatch: pytest.MonkeyPatch) -> None:
    package, held = packaged({"check": FIND}), Event()
    over: list[bool] = []

    def furnish(*arguments: object) -> None:
        assert over
        sys.exit()

    def hold() -> None:
        with locked(package / "rehearsal" / ".rehearsal.lock"):
            held.set()
            time.sleep(0.5)
            over.append(True)

    monkeypatch.setattr(rehearsal, "build_image", furnish)
    thread = Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(SystemExit):
        run(package)
    thread.join()


def holding(packaged: Packager, tmp_path: Path) -> tuple[Path, str]:
    """A package whose kernel starts a process that stays, and the end of that one's command line."""
    mark = f"mark-{tmp_path.parent.name}-{tmp_path.name}"
    hold = f"subprocess.call([sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])"
    return packaged({"check": FIND, "hold": hold}), mark


def test_terminated_rehearsal_leaves_nothing(packaged: Packager, isolation: str, tmp_path: Path) -> None:
    package, mark = holding(packaged, tmp_path)

    def terminate() -> None:
        assert comes_true(lambda: marked(mark))
        os.kill(os.getpid(), signal.SIGTERM)

    before, thread = signal.getsignal(signal.SIGTERM), Thread(target=terminate)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(package, layouts=("flat",), late=0.0)
    thread.join()
    assert comes_true(lambda: not marked(mark))
    assert stages() == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_killed_rehearsal_leaves_no_process_and_the_next_one_no_folder(
    packaged: Packager, isolation: str, tmp_path: Path
) -> None:
    package, mark = holding(packaged, tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = forked(rehearse_lightly, package, isolation, environment, output=tmp_path / "output")
    assert comes_true(lambda: process.exitcode is not None or marked(mark))
    assert process.exitcode is None, (tmp_path / "output").read_text()
    process.kill()
    process.join()
    assert comes_true(lambda: not marked(mark))
    assert [path.name.startswith("pairclf-") for path in temporary.iterdir()] == [True]
    assert len(stages()) == 1
    with stage.workspace() as own:
        assert stages() == [own.top.name]
        own.home.rmdir()
    assert stages() == []
    assert results(package / "rehearsal") == []
    assert not [*temporary.iterdir()]


def marked(mark: str) -> list[Path]:
    """Processes with it in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().rstrip(b"\0").endswith(mark.encode()):
                found.append(path)
    return found


def test_fault_that_never_strikes_or_does_no_harm_does_not_pass(packaged: Packager) -> None:
    package = packaged({"check": FIND, "predict": PREDICT})
    with pytest.raises(PackagingError, match="did not end as it must") as caught:
        run(package, inject=("oom", "wrong-python"), layouts=("flat",), late=0.1)
    assert "oom: the fault never struck" in str(caught.value)
    assert "wrong-python: the cell predict failed, and the first cell did not detect the fault" in str(caught.value)
    assert not (package / "rehearsal" / "report.json").exists()
    assert (package / "rehearsal" / "report-oom.json").is_file()


def test_kernel_whom_a_stray_column_leads_astray_does_not_pass(packaged: Packager) -> None:
    other = "wanted = wanted.with_columns(winner_model_a=0.4, winner_tie=0.2666667)"
    code = PREDICT.replace("wanted.write_csv", f"if pl.read_csv(test).width > 4:\n    {other}\nwanted.write_csv")
    package = packaged({"check": FIND, "predict": code})
    with pytest.raises(PackagingError, match=r"extra-columns: winner_model_a differs by 0\.066"):
        run(package, inject=("extra-columns",), speed=2, layouts=("flat",), late=0.1)
    assert read_passed(package).speed == 1, "what it is compared with is no trial"


def test_guard_lets_loopback_through() -> None:
    code = sandbox._GUARD + (
        "\nimport socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\nsocket.create_connection(('localhost', "
        "server.getsockname()[1])).close()\n"
        "try:\n    socket.getaddrinfo('example.org', 80)\nexcept PermissionError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


# --- packages of strangers -------------------------------------------------------------------------------------------


def test_what_lies_in_a_package_is_neither_removed_nor_made_readable(packaged: Packager, tmp_path: Path) -> None:
    """A folder of the name that rehearsals once had is the package's own, and links in it lead nowhere."""
    private, dear = tmp_path / "private", tmp_path / "pairclf-dear"
    for folder in (private, dear):
        folder.mkdir(mode=0o700)
        (folder / "dear.txt").write_text("dear")
    package = packaged({"check": FIND, "predict": PREDICT})
    old = package / "rehearsal" / ".tmp-rehearsal"
    (old / "flat" / "input").mkdir(parents=True)
    for link, target in ((old / "home", dear), (old / "x", private)):
        link.symlink_to(target)
        with pytest.raises(PairclfError, match=f"'rehearsal/.tmp-rehearsal/{link.name}' is a link"):
            run(package, layouts=("flat",), late=0.1)
        link.unlink()
    assert run(package, layouts=("flat",), late=0.1).passed
    assert (old / "flat" / "input").is_dir(), "it is not the rehearsal's"
    assert [(folder / "dear.txt").read_text() for folder in (private, dear)] == ["dear", "dear"]
    assert [folder.stat().st_mode & 0o777 for folder in (private, dear)] == [0o700, 0o700]


@pytest.mark.parametrize("given", [False, True], ids=["in the package", "given"])
def test_results_are_written_through_no_link(packaged: Packager, tmp_path: Path, given: bool) -> None:
    package, other = packaged({"check": FIND}), tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text("another's")
    out = tmp_path / "out" if given else package / "rehearsal"
    if given:
        out.mkdir()
        (out / ".rehearsal.lock").symlink_to(other / "report.json")
    else:
        out.symlink_to(other)
    with pytest.raises(PairclfError, match="is a link"):
        run(package, **({"out": out} if given else {}))
    assert (other / "report.json").read_text() == "another's"
    assert [path.name for path in other.iterdir()] == ["report.json"]


def test_package_of_another_machine_does_not_say_what_is_opened(
    packaged: Packager, competition: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows to rehearse with are the user's own files, at paths that only his own `package` wrote down."""
    package = packaged({"check": FIND, "predict": PREDICT})
    path = package / "build.json"
    for change in ({"test": str(tmp_path / "salaries.csv")}, {"sample": str(tmp_path / "salaries.csv")}):
        shutil.copyfile(competition[0], tmp_path / "salaries.csv")
        build = path.read_text()
        path.write_text(json.dumps(json.loads(build) | change))
        with pytest.raises(PackagingError, match=r"names no test file[\s\S]*give --test and --sample"):
            run(package)
        assert "this machine did not make this package" in " ".join(capsys.readouterr().err.split())
        path.write_text(build)
    shutil.rmtree(state_folder())  # as on another machine
    with pytest.raises(PackagingError, match="names no test file"):
        run(package)
    assert run(package, test=competition[0], sample=competition[1], layouts=("flat",), late=0.1).passed


def test_bundle_of_a_strangers_package_names_no_other_place(packaged: Packager) -> None:
    package = packaged({"check": FIND})
    build = json.loads((package / "build.json").read_text())
    build["bundles"][0]["folder"] = "../../elsewhere"
    (package / "build.json").write_text(json.dumps(build))
    with pytest.raises(PairclfError, match="a bundle in"):
        run(package)


ESCAPE = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
REMOUNT, BIND = 32, 4096
for place in (INPUT, marker.parent, "/", "/usr", "/proc"):
    target = os.fsencode(place)
    assert libc.mount(None, target, None, ctypes.c_ulong(REMOUNT | BIND), None) == -1, f"{place} was mounted anew"
    assert libc.mount(b"tmpfs", target, b"tmpfs", ctypes.c_ulong(0), None) == -1, f"{place} was covered"
assert subprocess.run(["mount", "-o", "remount,bind,rw", str(INPUT)]).returncode != 0
again = f"mount -o remount,bind,rw {INPUT} && touch {test}"
assert subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", again]).returncode != 0
for path in (marker, test, sample, INPUT / "new", "/usr/new", "/new", "/proc/sys/kernel/core_pattern", os.__file__):
    try:
        open(path, "a")
    except OSError:
        continue
    raise SystemExit(f"{path} can be written to")
rights = [line.split()[1] for line in open("/proc/self/status") if line.startswith("Cap")]
assert rights == ["0" * 16] * 5, rights
SEEN
home = pathlib.Path(os.environ["HOME"], "new")
home.write_text("1")
pathlib.Path("/tmp/new").write_text("1")
"""


def test_kernel_reaches_nothing_of_this_machine(
    packaged: Packager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is root in there, or the user himself: what it tries is what a notebook of a stranger would."""
    if not has_namespaces(tmp_path):
        pytest.skip("this machine allows no namespaces")
    home = tmp_path / "home"
    for name in (".kaggle/kaggle.json", ".netrc", ".cache/huggingface/token", ".ssh/id_ed25519"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("canary")
    monkeypatch.setenv("HOME", str(home))
    for name in ("KAGGLE_KEY", "HF_TOKEN", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "canary")
    package = tmp_path / "package"
    hidden = [*map(str, home.rglob("*")), str(package / "build.json"), "/etc/shadow", str(Path(__file__))]
    devices = [str(path) for path in Path("/dev").iterdir() if path.is_block_device()]
    seen = (
        f"for path in {hidden + devices!r}:\n    assert not os.path.lexists(path), path\n"
        "assert 'canary' not in str(dict(os.environ))\nassert not os.listdir('/run')"
    )
    packaged({"check": FIND, "escape": ESCAPE.replace("SEEN", seen), "predict": PREDICT})
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in package.rglob("*") if path.is_file()}
    report = run(package, layouts=("flat",), late=0.1)
    assert report.passed, report.last_output
    assert not Path("/tmp/new").exists()
    for path, was in before.items():
        assert (path.read_bytes(), path.stat().st_mode) == was


PLANT = """
for name in ("plan.json", "runner.log"):
    if not os.path.lexists(os.path.join(os.environ["HOME"], name)):
        os.symlink("DEAR", os.path.join(os.environ["HOME"], name))
"""


def test_launcher_needs_nothing_that_is_hidden(tmp_path: Path) -> None:
    """The kernel may have another interpreter, and the launcher's library is not there for it."""
    if not has_namespaces(tmp_path):
        pytest.skip("this machine allows no namespaces")
    assert has_namespaces(tmp_path, Path(shutil.which("true") or "/bin/true").resolve())


def test_links_that_a_kernel_leaves_are_not_followed(packaged: Packager, isolation: str, tmp_path: Path) -> None:
    """Its first run, in another layout, lays them where the rehearsal wrote for the second one."""
    dear = tmp_path / "dear.txt"
    dear.write_text("dear")
    assert run(packaged({"check": FIND + PLANT.replace("DEAR", str(dear)), "predict": PREDICT}), late=0.1).passed
    assert dear.read_text() == "dear"


def test_results_that_are_no_files_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with stage.workspace() as own:
        (own.results_folder / "submission.csv").symlink_to(tmp_path / "secret")
        (own.results_folder / "folder").mkdir()
        os.mkfifo(own.results_folder / "scores.parquet")
        (own.results_folder / "served.json").write_text("{}")
        assert own.discard_others() == ["folder", "scores.parquet", "submission.csv"]
        assert [path.name for path in own.results_folder.iterdir()] == ["served.json"]
    assert (tmp_path / "secret").read_text() == "secret"


def test_rehearsals_at_once_leave_each_other_alone() -> None:
    with stage.workspace() as one, stage.workspace() as other:
        assert one.top.is_dir()
        assert one.top != other.top
        assert one.top.stat().st_mode & 0o777 == 0o700


def test_home_in_the_note_of_a_killed_rehearsal_must_be_ours(tmp_path: Path) -> None:
    """What the note names is removed if it has the name of such a folder, and is no link to one."""
    dear = tmp_path / "pairclf-dear"
    dear.mkdir()
    (tmp_path / "pairclf-link").symlink_to(dear)
    (tmp_path / "other").mkdir()
    for name in ("pairclf-link", "other"):
        with stage.workspace() as own:
            own.home.rmdir()
            (own.top / "home.txt").write_text(str(tmp_path / name))
    assert dear.is_dir()
    assert (tmp_path / "other").is_dir()
