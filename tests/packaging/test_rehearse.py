from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from pairclf.config import Config
from pairclf.errors import DataError, PackagingError
from pairclf.packaging import rehearse as module
from pairclf.packaging.rehearse import rehearse

Packager = Callable[..., Path]
Competition = tuple[Path, Path]


@pytest.fixture(params=["namespaces", "guards"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways of keeping the notebook in; the first where this machine allows it."""
    if request.param == "guards":
        monkeypatch.setattr(module, "namespaces", lambda inputs: None)
    else:
        (tmp_path / "probe").mkdir()
        if module.namespaces(tmp_path / "probe") is None:
            pytest.skip("this machine allows no namespaces")
    return str(request.param)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment itself for the image: for notebooks that install nothing."""
    monkeypatch.setattr(module, "make_image", lambda folder, hidden: Path(sys.executable))


def quickly(packaged: Packager, code: str) -> Path:
    return packaged(code, after="inputs")


PRY = """
import importlib.util, socket
assert importlib.util.find_spec("iniconfig"), "the wheel was not installed"
assert "someone" not in os.environ.get("HOME", "") and "SECRET_TOKEN" not in os.environ
assert os.environ["KAGGLE_IS_COMPETITION_RERUN"]
for path in (wheels / "new", test):
    try:
        open(path, "a")
        raise SystemExit("the input can be written to")
    except OSError as error:
        print("input:", error.strerror)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
    raise SystemExit("the network can be reached")
except OSError as error:
    print("network:", error)
child = subprocess.run([sys.executable, "-c", "import urllib.request as r; r.urlopen('http://192.0.2.1', timeout=5)"])
assert child.returncode == 1
Path("submission.csv").write_bytes(sample.read_bytes())
"""


def test_submission_comes_out_and_nothing_else_gets_through(
    packaged: Packager, competition: Competition, tmp_path: Path, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    package = packaged(PRY)
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in package.rglob("*") if path.is_file()}
    report = rehearse(package, *competition, tmp_path / "out")

    assert (tmp_path / "out" / "submission.csv").read_bytes() == competition[1].read_bytes()
    assert report.submission["rows"] == 2
    network, inputs = {
        "namespaces": ("namespace of its own (Network is unreachable)", "read-only mount (Read-only file system)"),
        "guards": ("guard on Python's sockets (no network", "no permission to write (Permission denied)"),
    }[isolation]
    assert report.network.startswith(network)
    assert report.input == inputs
    assert [stage for stage in report.seconds if stage.startswith("cell")] == [
        f"cell {name}" for name in ("settings", "machine", "inputs", "install", "score")
    ]
    assert report.peak_mb > 10
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["submission"] == report.submission
    executed = nbformat.read(tmp_path / "out" / "executed.ipynb", as_version=4)
    assert "input:" in str(executed.cells[-1].outputs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "executed.ipynb",
        "report.json",
        "submission.csv",
    ]
    assert before == {path: (path.read_bytes(), path.stat().st_mode) for path in package.rglob("*") if path.is_file()}
    assert "a-notebook.ipynb" in render(report)


def render(report: module.Report) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(report.render())
    return captured.get()


@pytest.mark.usefixtures("quick")
def test_failing_command_is_told_with_its_own_words(
    packaged: Packager, competition: Competition, tmp_path: Path
) -> None:
    code = "subprocess.check_call([sys.executable, '-c', 'import sys; sys.exit(\"the head has 5 classes\")'])"
    with pytest.raises(PackagingError, match=r"cell 'score' failed:[\s\S]*the head has 5 classes") as caught:
        rehearse(quickly(packaged, code), *competition, tmp_path / "out")
    assert "Traceback" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["executed.ipynb"]


@pytest.mark.usefixtures("quick")
def test_dead_kernel_is_a_failed_cell(packaged: Packager, competition: Competition, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match="cell 'score' failed"):
        rehearse(quickly(packaged, "os._exit(9)"), *competition, tmp_path / "out")


@pytest.mark.usefixtures("quick")
def test_wrong_submission_is_refused_and_an_older_one_stays(
    packaged: Packager, competition: Competition, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "submission.csv").write_text("older")
    code = "Path('submission.csv').write_text(sample.read_text().replace('0.3333334', 'nan'))"
    with pytest.raises(DataError):
        rehearse(quickly(packaged, code), *competition, out)
    assert (out / "submission.csv").read_text() == "older"


@pytest.mark.usefixtures("quick")
def test_missing_submission_and_what_a_killed_rehearsal_left(
    packaged: Packager, competition: Competition, tmp_path: Path
) -> None:
    left = tmp_path / "out" / ".tmp-rehearsal" / "input"
    left.mkdir(parents=True)
    left.chmod(0o555)
    with pytest.raises(PackagingError, match=r"without writing submission\.csv"):
        rehearse(quickly(packaged, "pass"), *competition, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["executed.ipynb"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("payload", ["bundle/fold0/head.safetensors", "wheels/pairclf-wheels.json"])
def test_changed_byte_is_refused_before_anything_is_installed(
    packaged: Packager, competition: Competition, tmp_path: Path, payload: str
) -> None:
    package = quickly(packaged, "pass")
    content = bytearray((package / payload).read_bytes())
    content[-2] ^= 1
    (package / payload).write_bytes(content)
    with pytest.raises(PackagingError, match=r"cell 'inputs' failed:[\s\S]*(was changed|no pairclf-wheels)"):
        rehearse(package, *competition, tmp_path / "out")


@pytest.mark.usefixtures("quick")
def test_sandbox_that_does_not_hold_is_refused(
    packaged: Packager, competition: Competition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "namespaces", lambda inputs: module.Sandbox((), "nothing", "nothing"))
    with pytest.raises(PackagingError, match="does not hold"):
        rehearse(quickly(packaged, "pass"), *competition, tmp_path / "out")


def test_folder_that_is_no_package(competition: Competition, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match="is no package"):
        rehearse(tmp_path, *competition, tmp_path / "out")


@pytest.mark.usefixtures("quick")
def test_input_that_is_not_there_is_named(
    packaged: Packager, competition: Competition, tmp_path: Path, config: Config
) -> None:
    test, sample = competition
    package = quickly(packaged, "pass")
    with pytest.raises(PackagingError, match=r"nowhere\.csv is no file"):
        rehearse(package, tmp_path / "nowhere.csv", sample, tmp_path / "out")
    config.package.base_model_source = "google/gemma-2/transformers/gemma-2-9b-it/2"
    with pytest.raises(PackagingError, match=r"gemma-2-9b-it/2, and no folder holds it here[\s\S]*--base"):
        rehearse(quickly(packaged, "pass"), test, sample, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_attached_base_model_is_found(
    packaged: Packager, competition: Competition, tmp_path: Path, config: Config
) -> None:
    base = tmp_path / "some" / "model"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    config.package.base_model_source = "google/gemma-2/Transformers/gemma-2-9b-it/2"
    code = 'Path("submission.csv").write_bytes(sample.read_bytes())\nassert Path(base[1], "config.json").is_file()'
    report = rehearse(quickly(packaged, code), *competition, tmp_path / "out", base=base)
    assert report.submission["rows"] == 2


def test_guard_lets_loopback_through(tmp_path: Path) -> None:
    from pairclf.packaging.sandbox import _GUARD

    code = _GUARD + (
        "\nimport socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\nsocket.create_connection(('localhost', "
        "server.getsockname()[1])).close()\n"
        "try:\n    socket.getaddrinfo('example.org', 80)\nexcept PermissionError:\n    print('refused')\n"
    )
    done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
