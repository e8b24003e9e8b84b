"""`rehearse`: the packaged notebook, executed as Kaggle's hidden rerun would execute it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pairclf.config import parse_yaml, resolve
from pairclf.console import progress, table
from pairclf.data.tables import check_submission
from pairclf.errors import PackagingError
from pairclf.files import atomic_file, write_json
from pairclf.packaging import runner
from pairclf.packaging.image import make_image
from pairclf.packaging.metadata import PAYLOADS
from pairclf.packaging.payload import DATASET_METADATA, KERNEL_METADATA, marker_name
from pairclf.packaging.sandbox import Sandbox, guards, namespaces, release
from pairclf.packaging.wheelhouse import Wheel
from pairclf.task import Task

SUBMISSION, EXECUTED = "submission.csv", "executed.ipynb"
_TAIL = 25  # lines shown of a cell that failed
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(slots=True)
class Report:
    """What a rehearsal found. Times in wall-clock seconds."""

    notebook: str
    seconds: dict[str, float] = field(default_factory=dict)  # by stage: ours first, then the cells by their ids
    peak_mb: float = 0.0  # resident memory of the largest process of the notebook
    network: str = ""
    input: str = ""
    submission: dict[str, Any] = field(default_factory=dict)  # what check_submission returned

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def render(self) -> Table:
        made = table(f"Rehearsal of {self.notebook}", "stage", "result")
        for stage, seconds in self.seconds.items():
            made.add_row(stage, f"{seconds:.1f} s")
        made.add_row("all", f"{self.total_seconds:.1f} s")
        made.add_row("largest process", f"{self.peak_mb:,.0f} MB")
        made.add_row("network", self.network)
        made.add_row("input", self.input)
        made.add_row("submission", f"{self.submission['rows']:,} rows, ids in the sample's order")
        made.add_row("mean probabilities", ", ".join(f"{n} {p:.4f}" for n, p in self.submission["means"].items()))
        return made


@dataclass(frozen=True, slots=True)
class _Stage:
    """The folders of one rehearsal: what Kaggle calls input and working, and what it has besides."""

    top: Path

    @property
    def image(self) -> Path:
        return self.top / "image"

    @property
    def input(self) -> Path:
        return self.top / "input"

    @property
    def working(self) -> Path:
        return self.top / "working"

    @property
    def home(self) -> Path:
        return self.top / "home"

    def environment(self) -> dict[str, str]:
        """Everything that the notebook sees of this machine's environment."""
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return kept | {
            "PATH": f"{self.image / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "LANG": "C.UTF-8",
            "COLUMNS": "120",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "KAGGLE_IS_COMPETITION_RERUN": "1",
            "PAIRCLF_KAGGLE_INPUT": str(self.input),
        }


def rehearse(folder: Path, test: Path, sample: Path, out: Path, *, base: Path | None = None) -> Report:
    """Execute a package's notebook offline, in a stand-in for Kaggle's image, and check what it writes.

    In `out` it leaves `submission.csv`, `executed.ipynb` (after a failure too, up to the cell that failed) and
    `report.json`.

    Args:
        folder: what `package` made.
        test: the rows to predict; shown to the notebook as `test` with this file's suffix.
        sample: the submission's ids, order and columns.
        out: folder for the results.
        base: folder of the base model, where the package attaches one from Kaggle.

    Raises:
        PackagingError: the folder is no package, a cell failed, or the sandbox does not hold.
        DataError: the submission is not what Kaggle would accept.
    """
    metadata, task = _read_package(folder)
    report = Report(notebook=str(metadata["code_file"]))
    with _stage(out) as stage:
        with _timed(report, "stand-in for the image"):
            wheels = [Wheel.parse(path.name) for path in (folder / "wheels").glob("*.whl")]
            python = make_image(stage.image, {wheel.project for wheel in wheels})
        with _timed(report, "input"):
            _lay_out(stage.input, folder, metadata, {f"test{test.suffix}": test, "sample_submission.csv": sample}, base)
        sandbox = namespaces(stage.input)
        if sandbox is None:  # permissions belong to a file, not to its name: the guards must not meet linked originals
            _unlink_originals(stage.input)
            sandbox = guards(stage.input, next(stage.image.glob("lib/python*/site-packages")))
        report.network, report.input = sandbox.network, sandbox.input
        notebook = folder / "notebook" / report.notebook
        try:
            _execute(stage, sandbox, python, notebook, report)
        finally:
            _keep(stage.working / EXECUTED, out / EXECUTED)
        with _timed(report, "check"):
            submission = stage.working / SUBMISSION
            if not submission.is_file():
                raise PackagingError(f"the notebook ended without writing {SUBMISSION}", where=notebook)
            report.submission = check_submission(submission, sample, task)
            _keep(submission, out / SUBMISSION)
    write_json(out / "report.json", asdict(report))
    return report


def _read_package(folder: Path) -> tuple[dict[str, Any], Task]:
    """kernel-metadata.json, and the task of the bundles."""
    metadata = folder / "notebook" / KERNEL_METADATA
    configs = sorted((folder / "bundle").glob("*/config.yaml"))
    if not metadata.is_file() or not configs:
        raise PackagingError(f"{folder} is no package", remedy="give the folder that `pairclf package` made")
    config = resolve(parse_yaml(configs[0].read_text(encoding="utf-8"), configs[0]), configs[0])
    return json.loads(metadata.read_text(encoding="utf-8")), config.task


@contextmanager
def _stage(out: Path) -> Iterator[_Stage]:
    """The rehearsal's folders, below `out` so that files can be linked rather than copied; removed at the end."""
    stage = _Stage(out.resolve() / ".tmp-rehearsal")
    _clear(stage)
    for folder in (stage.input, stage.working, stage.home):
        folder.mkdir(parents=True)
    try:
        yield stage
    finally:
        _clear(stage)


def _clear(stage: _Stage) -> None:
    if stage.top.exists():
        release(stage.input)
        shutil.rmtree(stage.top)


@contextmanager
def _timed(report: Report, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.seconds[stage] = time.perf_counter() - start


def _lay_out(
    inputs: Path, folder: Path, metadata: Mapping[str, Any], competition: Mapping[str, Path], base: Path | None
) -> None:
    """Mount everything that the metadata names, as Kaggle does: `SLUG/` for a dataset or competition."""
    for name, source in competition.items():
        if not source.is_file():
            raise PackagingError(f"{source} is no file", remedy=f"give the competition's {name}")
        _link_or_copy(source.resolve(), inputs / metadata["competition_sources"][0] / name)
    for payload, identity in zip(PAYLOADS, metadata["dataset_sources"], strict=True):
        if not (folder / payload / marker_name(payload)).is_file():
            raise PackagingError(f"{payload}/{marker_name(payload)} is missing", where=folder, remedy="package again")
        mounted = inputs / identity.partition("/")[2]
        _link_folder(folder / payload, mounted)
        (mounted / DATASET_METADATA).unlink(missing_ok=True)  # not uploaded: Kaggle's client reads it
    for source in metadata["model_sources"]:
        if base is None or not (base / "config.json").is_file():
            raise PackagingError(
                f"the notebook attaches the model {source}, and {base or 'no folder'} holds it here",
                remedy="give the folder of the base model, with its config.json, as --base",
            )
        _link_folder(base, inputs.joinpath(*source.split("/")[1:]))


def _link_folder(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _link_or_copy(path.resolve(), target / path.relative_to(source))


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none. A symbolic link would lead out of the read-only mount."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _unlink_originals(inputs: Path) -> None:
    for path in sorted(inputs.rglob("*")):
        if path.is_file() and path.stat().st_nlink > 1:
            copy = path.with_name(f"{path.name}.copy")
            shutil.copy2(path, copy)
            os.replace(copy, path)


def _execute(stage: _Stage, sandbox: Sandbox, python: Path, notebook: Path, report: Report) -> None:
    """Run the cells and fill in the report as they end.

    Raises:
        PackagingError: a cell failed (its last lines are shown), or the sandbox did not hold.
    """
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    executed = stage.working / EXECUTED
    command = [*sandbox.prefix, str(python), "-I", str(Path(runner.__file__)), str(notebook.resolve()), str(executed)]
    log = stage.home / "runner.log"
    with log.open("w") as errors, progress("rehearsing", len(cells)) as advance:
        process = subprocess.Popen(
            [*command, str(stage.input)],
            cwd=stage.working,
            env=stage.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        failures: list[str] = []
        try:
            for event in map(json.loads, process.stdout or ()):
                failures += _note(event, report)
                if "cell" in event:
                    advance(note=event["cell"])
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if failures:
        raise PackagingError(failures[0], where=notebook, remedy=f"{EXECUTED} holds all that the cells printed")
    if process.returncode != 0:
        raise PackagingError(f"the notebook could not be run:\n{_tail(log.read_text())}", where=notebook)


def _note(event: Mapping[str, Any], report: Report) -> Iterator[str]:
    """Take one line of the runner into the report; yield what it tells of failures."""
    if "blocked" in event:
        for what, reason in event["blocked"].items():
            words = getattr(report, what)
            setattr(report, what, f"{words} ({reason})")
            if reason is None:
                yield f"the sandbox does not hold: {what} is open in spite of: {words}"
    elif "cell" in event:
        report.seconds[f"cell {event['cell']}"] = event["seconds"]
        if event["failed"]:
            yield f"the notebook's cell {event['cell']!r} failed:\n{_tail(event['output'])}"
    else:
        report.peak_mb = event["peak_mb"]


def _tail(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_TAIL:])


def _keep(source: Path, target: Path) -> None:
    if source.is_file():
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)
