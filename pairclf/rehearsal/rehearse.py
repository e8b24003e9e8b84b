"""`rehearse`: execute the package's kernel as Kaggle's hidden rerun would, and check the result."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import current_thread, main_thread

from pairclf import __version__
from pairclf.console import Advance, console, counted, progress
from pairclf.data.formats import as_text
from pairclf.errors import ModelError, PackagingError
from pairclf.files import atomic_file, is_regular, locked, private_folder, refuse_special_files, sha256_file
from pairclf.hardware import MACHINES
from pairclf.inference.deadline import seconds_until
from pairclf.packaging.build_record import Build, is_own, own_note, read_build
from pairclf.packaging.metadata import KERNEL
from pairclf.packaging.payload import verify_package
from pairclf.rehearsal import gateway
from pairclf.rehearsal.cell_runner import EXECUTED, HEAD, PRINTED
from pairclf.rehearsal.faults import FAULTS, InjectedFault
from pairclf.rehearsal.hidden_test import enlarge, read_raw, write_raw
from pairclf.rehearsal.kernel_run import SCORES, SERVED, SUBMISSION, KernelRun, run_kernel
from pairclf.rehearsal.mounts import LAYOUTS, Mount, mounts_of
from pairclf.rehearsal.projection import link_bundles, project_hidden_test
from pairclf.rehearsal.report import REHEARSAL, REPORT, RehearsalReport, RehearsalReports, read_report, write_report
from pairclf.rehearsal.resource_monitor import GB
from pairclf.rehearsal.result_checks import RunChecks
from pairclf.rehearsal.workspace import THIS_ENVIRONMENT, LayoutDirs, Workspace, build_image, workspace
from pairclf.signals import answering

SLOWDOWN = 4.0
"""With the fault `slow`, all rows take so many times what there is until the deadline."""

FITTING_SHARE = 0.75
"""With the fault `oom`, a pass of so much of the longest sequence fits."""

_RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
_LOCK = ".rehearsal.lock"


@dataclass(frozen=True, slots=True)
class Options:
    """How a package is rehearsed.

    Attributes:
        test: the rows to predict; None: as the package's record says.
        sample: the submission's ids, order and columns; None: likewise.
        base: folder of the base model, where the package attaches one from Kaggle.
        out: folder for the results; None: `rehearsal` in the package.
        rows: of the hidden test: the file's rows are repeated under new ids; None: as the file is.
        image: `here`: the versions of this environment; `3.12`: that Python, with the image's own; None: `here` where
            the package is for this Python, else the first one that it is for.
        layouts: of the mounts; the first is run whole, the others up to the end of the first cell.
        late: seconds of the kernel's clock from the first cell on, until the mounts that are empty at first are filled.
        inject: names of faults, each in a run of its own.
        speed: of the kernel's clock.
        commit: as when the notebook is saved, rather than the hidden rerun.
        memory_gb, disk_gb: of the machine; None: as Kaggle's.
    """

    test: Path | None = None
    sample: Path | None = None
    base: Path | None = None
    out: Path | None = None
    rows: int | None = None
    image: str | None = None
    layouts: tuple[str, ...] = ("flat", "typed")
    late: float = 1.0
    inject: tuple[str, ...] = ()
    speed: float = 1.0
    commit: bool = False
    memory_gb: float | None = None
    disk_gb: float | None = None


@dataclass(frozen=True, slots=True)
class _Rehearsal:
    """The settings that all runs of a rehearsal share."""

    folder: Path
    build: Build
    options: Options
    test: Path
    sample: Path
    image: str
    out: Path
    memory: int
    disk: int
    deadline: float

    @property
    def inputs(self) -> str:
        """Identity of what is predicted."""
        parts = (sha256_file(self.test), sha256_file(self.sample), str(self.options.rows))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def rehearse(folder: Path, options: Options) -> RehearsalReports:
    """Execute a package's kernel offline, in a stand-in for Kaggle's image, and judge how it ends.

    SIGTERM ends it as Ctrl-C does; the kernel does not outlive it.

    In `out` it leaves `report.json`, `submission.csv`, `scores.parquet` and `executed.ipynb` (`executed.log` of a
    script), after a failure too, up to the cell that failed; of a run with a fault `report-FAULT.json` and so on, and
    of one that is saved, or has a faster clock, `report-trial.json`: neither takes the place of what `push` asks for.

    Args:
        folder: what `package` made.
        options: how.

    Returns:
        The report of each run: without faults one, else one for each fault, and before them an undisturbed one where
        a fault's is compared with it and `out` has none.

    Raises:
        PackagingError: the folder is no package, an option can't be had, the sandbox does not hold, or a run did not
            end as it must; its report is written then, and shown.
    """
    rehearsal = _construct(folder, options)
    names: list[str | None] = [*options.inject] or [None]
    with locked(rehearsal.out / _LOCK), _interruptible():
        if any(name and FAULTS[name].same_scores for name in names) and not _rehearsed(rehearsal):
            names.insert(0, None)
        reports = RehearsalReports([_rehearse_once(rehearsal, name) for name in names])
    if not reports.passed:
        console.print(reports.render())
        problems = [(run.fault or run.kernel, problem) for run in reports.runs for problem in run.problems]
        lines = "\n".join(f"  {name}: {problem}" for name, problem in problems)
        raise PackagingError(
            f"the rehearsal did not end as it must:\n{lines}",
            where=rehearsal.out,
            remedy=f"{EXECUTED} (of a script {PRINTED}; of a fault or trial with its name) holds all that was printed",
        )
    return reports


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at SIGTERM too, so that everything is cleared up. Only the main thread gets signals."""
    if current_thread() is not main_thread():
        yield
        return
    with answering((signal.SIGTERM,), signal.default_int_handler):
        yield


# --- construct -------------------------------------------------------------------------------------------------------


def _construct(folder: Path, options: Options) -> _Rehearsal:
    """Check everything that can be checked before the first run."""
    build = _without_strange_paths(read_build(folder))
    if options.out is not None and options.out.exists():
        refuse_special_files(options.out)
    pythons = build.package.python_versions
    image = options.image or (THIS_ENVIRONMENT if _RUNNING in pythons else pythons[0])
    _check_options(build, options, image)
    private_folder(own_note("rehearsals", build.identity).parent)  # found out now, and not after the run
    verify_package(folder, build)
    test, sample = options.test or build.test, options.sample or build.sample
    if test is None or sample is None:
        raise PackagingError(
            "the package names no test file and sample submission: it was made of bundles, or on another machine, or "
            "its config has none",
            remedy="give --test and --sample",
        )
    for path in (test, sample):
        if not path.is_file():
            raise PackagingError(f"{path} is no file", remedy="give --test and --sample as Kaggle mounts them")
        if not read_raw(path).height:
            raise PackagingError(f"{path} has no rows: there is nothing to rehearse with", remedy="give some rows")
    _check_ids(build, test, sample)
    machine = MACHINES[build.package.machine_shape]
    return _Rehearsal(
        folder=folder,
        build=build,
        options=options,
        test=test,
        sample=sample,
        image=image,
        out=options.out or folder / REHEARSAL,
        memory=round(GB * (options.memory_gb or machine.memory_gb)),
        disk=round(GB * (options.disk_gb or machine.disk_gb)),
        deadline=seconds_until(build.package.due, datetime.now(UTC)),
    )


def _check_ids(build: Build, test: Path, sample: Path) -> None:
    """Refuse files of different rows now, and not minutes later, in the notebook. Absent columns are its matter."""
    names = {test: build.columns.get("id") or "id", sample: build.submission.id or "id"}
    frames = {path: read_raw(path) for path in names}
    if any(name not in frames[path] for path, name in names.items()):
        return
    own, expected = (as_text(frames[path][name]) for path, name in names.items())
    if missing := expected.filter(~expected.is_in(own.to_list())).to_list():
        raise PackagingError(
            f"{sample} has {counted(len(missing), 'id')} that {test} has not, such as {missing[0]}",
            remedy="give the sample submission of this test file with --sample",
        )


def _without_strange_paths(build: Build) -> Build:
    """The record, without files outside the package if another machine wrote it."""
    if is_own(build):
        return build
    console.print(
        "note: this machine did not make this package. The rehearsal runs its notebook: go on only if you trust the "
        "package's author. Its paths of test file, sample submission and image profiles are not used"
    )
    package = build.package.model_copy(update={"image_freezes": None})
    return build.model_copy(update={"test": None, "sample": None, "package": package})


def _check_options(build: Build, options: Options, image: str) -> None:
    if unknown := [name for name in options.inject if name not in FAULTS]:
        raise PackagingError(f"--inject {','.join(unknown)}: no such fault", remedy=f"choose from {', '.join(FAULTS)}")
    if not options.layouts or not LAYOUTS.keys() >= set(options.layouts):
        raise PackagingError(f"layouts={options.layouts}: unknown", remedy=f"choose from {', '.join(LAYOUTS)}")
    if options.inject and options.commit:
        raise PackagingError(
            "--inject and --commit: a notebook that is saved fails at every fault, to tell you of it",
            remedy="leave --commit out: faults are for the hidden rerun",
        )
    python = _RUNNING if image == THIS_ENVIRONMENT else image
    if python not in build.package.python_versions:
        raise PackagingError(
            f"--image {image} has Python {python}, and the package is for {', '.join(build.package.python_versions)}",
            remedy=f"--image {build.package.python_versions[0]}, or package.python_versions=[..., '{python}'] and "
            "package again",
        )


def _rehearsed(rehearsal: _Rehearsal) -> bool:
    """Whether `out` has the report of an undisturbed run of this build on these rows, and this machine wrote it."""
    path, own = rehearsal.out / REPORT, own_note("rehearsals", rehearsal.build.identity)
    if not all(map(is_regular, (path, own, rehearsal.out / SUBMISSION))):
        return False
    report = read_report(path)
    same = (report.build, report.inputs) == (rehearsal.build.identity, rehearsal.inputs)
    return report.passed and same and report == read_report(own)


# --- set up and run --------------------------------------------------------------------------------------------------


def _rehearse_once(rehearsal: _Rehearsal, name: str | None) -> RehearsalReport:
    """Run the kernel once, and leave the report in `out`."""
    with workspace() as own:
        run = _Run(rehearsal, FAULTS[name] if name else None, _empty_report(rehearsal, name), own)
        report = run.report
        with run.timed("input laid out"):
            run.make_inputs()
        with run.timed("image made"):
            wheels = [rehearsal.folder / part.folder for part in rehearsal.build.of("wheels")]
            build_image(own, rehearsal.image, rehearsal.build.package.image_freezes, wheels, run.hook())
        with progress(f"rehearsing {name or report.kernel}", run.count_cells()) as advance:
            for layout in report.layouts:
                run.run_layout(own.layout_dirs(layout), advance)
                if report.failed:
                    break
        run.check_and_keep()
    return report


def _empty_report(rehearsal: _Rehearsal, name: str | None) -> RehearsalReport:
    build, options = rehearsal.build, rehearsal.options
    whole, *others = options.layouts
    return RehearsalReport(
        pairclf=__version__,
        build=build.identity,
        kernel=build.code_file,
        fault=name,
        inputs=rehearsal.inputs,
        rows=0,
        rerun=not options.commit,
        image="versions of this environment" if rehearsal.image == THIS_ENVIRONMENT else "the image's versions",
        layouts=[*others, whole] if name is None else [whole],
        # What faults are compared with is no trial.
        speed=1.0 if name is None and options.inject else options.speed,
        hours=build.package.limit / 3600,
        deadline=rehearsal.deadline,
        memory_limit=rehearsal.memory,
        disk_limit=rehearsal.disk,
        **({} if name is None else {"expected": FAULTS[name].expected}),
    )


@dataclass(slots=True)
class _Run:
    """One run of the kernel, with a fault or without.

    Attributes:
        sample: the sample submission that the kernel sees.
        mounts: all that the kernel sees.
        spoiled: file that the fault has changed, or the kind of mount that it has emptied.
    """

    rehearsal: _Rehearsal
    fault: InjectedFault | None
    report: RehearsalReport
    workspace: Workspace
    sample: Path = Path()
    mounts: list[Mount] = field(default_factory=list)
    spoiled: str = ""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.report.seconds[stage] = time.perf_counter() - start

    def make_inputs(self) -> None:
        """Make the competition's files and all mounts, spoiled as the fault has it."""
        rehearsal, fault, generated = self.rehearsal, self.fault, self.workspace.generated
        build, test, sample = rehearsal.build, rehearsal.test, rehearsal.sample
        rows, fields = rehearsal.options.rows, [build.columns.get(name) or name for name in build.task.fields]
        if rows is not None:
            ids = build.columns.get("id") or "id", build.submission.id or "id"
            test, sample = enlarge(test, sample, rows, generated, fields, ids)
        if fault and fault.spoil_rows:
            spoiled_test = generated / f"spoiled{test.suffix}"
            write_raw(spoiled_test, fault.spoil_rows(read_raw(test), fields))
            test = spoiled_test
        competition = {f"test{test.suffix}": test.resolve(), f"sample_submission{sample.suffix}": sample.resolve()}
        if build.package.kernel_type == "server":  # it gets a stand-in for the package through which Kaggle asks
            empty = generated / "__init__.py"
            empty.touch()
            server = {"__init__.py": empty, "default_inference_server.py": Path(gateway.__file__)}
            competition |= {f"kaggle_evaluation/{name}": path for name, path in server.items()}
        self.mounts = mounts_of(rehearsal.folder, build, competition, rehearsal.options.base)
        if fault and fault.spoil_mounts:
            self.mounts, self.spoiled = fault.spoil_mounts(self.mounts, generated)
        self.sample, self.report.rows = sample, read_raw(sample).height

    def hook(self) -> str:
        """Text of the module that the fault needs in every process; empty: none."""
        if self.fault is None or not self.fault.hook:
            return ""
        report = self.report
        return self.fault.module(FITTING_SHARE, seconds=SLOWDOWN * report.deadline / report.speed / report.rows)

    def count_cells(self) -> int:
        """How many cells will run in all layouts."""
        report = self.report
        text = (self.rehearsal.folder / KERNEL / report.kernel).read_text(encoding="utf-8")
        if report.kernel.endswith(".py"):
            count = len(HEAD.findall(text))
        else:
            count = sum(cell["cell_type"] == "code" for cell in json.loads(text)["cells"])
        return count + len(report.layouts) - 1

    def run_layout(self, dirs: LayoutDirs, advance: Advance) -> None:
        """Run the kernel in one layout: the last one whole with its first mount late, others with all mounts late.

        Where a fault hurries the kernel's waits, no mount is late.
        """
        rehearsal, report, fault = self.rehearsal, self.report, self.fault
        whole = dirs.layout == report.layouts[-1]
        sandbox = dirs.sandbox(rehearsal.disk)
        late = self.mounts[:1] if whole else self.mounts
        if fault is not None and fault.skips_waits:
            late = []
        dirs.mount(self.mounts, late, sandbox)
        kernel = KernelRun(
            code=rehearsal.folder / KERNEL / report.kernel,
            prelude=fault.prelude if fault else "",
            cells=None if whole else 1,
            late=rehearsal.options.late / report.speed,
            fill=lambda: dirs.fill(late, sandbox),
        )
        run_kernel(kernel, dirs, sandbox, report, advance)

    def check_and_keep(self) -> None:
        """Check what the run left, and keep it."""
        out, report, results = self.rehearsal.out, self.report, self.workspace.results_folder
        if self.fault is None and not report.failed:
            with self.timed("forecast"):
                self._project()
        with self.timed("check"):
            report.problems += [f"the kernel left {name}, which is no file" for name in self.workspace.discard_others()]
            checks = RunChecks(self.rehearsal.build, self.sample, self.fault, self.spoiled, out / SUBMISSION)
            checks.check(self.workspace, report)
        # Where files are not hidden from the kernel, it could have put a link there meanwhile.
        refuse_special_files(self.rehearsal.folder if self.rehearsal.options.out is None else out)
        for name in (SUBMISSION, SCORES, SERVED, EXECUTED, PRINTED):
            target = out / f"{Path(name).stem}{report.ending}{Path(name).suffix}"
            target.unlink(missing_ok=True)
            if (results / name).is_file():
                with atomic_file(target) as temporary:
                    shutil.copyfile(results / name, temporary)
        write_report(out, report)

    def _project(self) -> None:
        """Project the hidden test to this machine and Kaggle's; a model that does not fit there is a problem."""
        build, options, report = self.rehearsal.build, self.rehearsal.options, self.report
        bundles = link_bundles(self.mounts, build, self.workspace.generated / "bundles")
        console.quiet = True  # the bars of the rows that it reads are another command's
        try:
            rows, base = options.rows, options.base
            for projection in project_hidden_test(report, build, bundles, self.rehearsal.test, rows, base):
                report.projections.append(projection)
        except ModelError as error:
            report.problems.append(f"on Kaggle's machine: {error}")
        finally:
            console.quiet = False
