"""What a rehearsal found, and whether that is enough to push.

The report lies twice: beside the results as `rehearsal/report.json`, for people, and in a folder of this machine's own
under the build's identity, which `push` reads: whoever made a package could have written the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Group
from rich.table import Table

from pairclf.config import Section, checked
from pairclf.console import table
from pairclf.errors import PackagingError
from pairclf.files import is_regular, state_folder, write_private, write_text
from pairclf.inference.deadline import spoken
from pairclf.packaging.record import parse_json, read_build
from pairclf.rehearsal.meter import GB

REHEARSAL, REPORT = "rehearsal", "report.json"


class Parity(Section):
    """A bundle's probe rows, scored by the kernel."""

    bundle: str = Field(description="its folder in the payload")
    rows: int = Field(0, description="that were scored again")
    difference: float | None = Field(None, description="largest of a logit to the validated one; null: not scored")
    tolerance: float = Field(0.0, description="that its dtype allows")

    @property
    def holds(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance


class Scored(Section):
    """Rows of the submission by what stands behind them."""

    both: int = Field(description="scored in both orders, or in the only one that the task has")
    one: int = Field(description="scored in one order of two")
    prior: int = Field(description="nothing but the prior")


class Projection(Section):
    """What the kernel would take elsewhere, or with more rows, without a deadline."""

    machine: str = Field(description="where")
    rows: int = Field(description="of the hidden test")
    predict: float = Field(description="seconds to score all of them in full")
    rest: float = Field(description="seconds of all other cells, as measured here")
    source: str = Field(description="where the figures come from")
    judged: bool = Field(description="whether it must be over by the deadline for the rehearsal to pass")
    at_most: bool = Field(False, description="whether more of it was taken to grow with the rows than does")

    @property
    def total(self) -> float:
        return self.predict + self.rest


class Report(Section):
    """One run of a package's kernel. Seconds are those of the clock on the wall, bytes those of a disk."""

    pairclf: str = Field(description="version")
    build: str = Field(description="identity of the package")
    kernel: str = Field(description="name of its file")
    fault: str | None = Field(None, description="what was injected; null: nothing")
    must: str = Field("all rows scored", description="what had to come of it")
    struck: list[str] = Field([], description="what the fault did harm to")
    inputs: str = Field(description="SHA-256 over test file, sample submission and number of rows")
    rows: int = Field(description="of the test")
    rerun: bool = Field(description="as the hidden rerun; else as when the notebook is saved")
    image: str = Field(description="what stood for Kaggle's image")
    layouts: list[str] = Field(description="of the mounts; the last was run whole, those before up to the first cell")
    speed: float = Field(description="of the clock")
    hours: float = Field(description="that the competition gives")
    deadline: float = Field(description="seconds from the first cell on, in which the submission must be complete")
    python: str = Field("", description="version, as the kernel saw it")
    network: str = Field("", description="how it was cut")
    input: str = Field("", description="how it was kept from writing there")
    working: str = Field("", description="how its size was kept")
    files: str = Field("", description="how this machine's other files were kept from it")
    seconds: dict[str, float] = Field({}, description="by stage: ours, then the cells by their ids")
    memory_peak: int = Field(0, description="bytes of all processes together")
    memory_limit: int = Field(description="bytes")
    disk_peak: int = Field(0, description="bytes in the working folder")
    disk_limit: int = Field(description="bytes")
    killed: list[str] = Field([], description="processes that went over a limit")
    failed: str | None = Field(None, description="id of the cell that failed")
    said: str = Field("", description="last lines of that cell")
    submission: dict[str, Any] = Field({}, description="what data.tables.check_submission returned")
    scored: Scored | None = Field(None, description="null: the kernel wrote no scores")
    parity: list[Parity] = Field([], description="bundle by bundle")
    projections: list[Projection] = Field([], description="without a deadline")
    problems: list[str] = Field([], description="all that keeps it from passing")
    passed: bool = Field(False, description="whether it ended as it must")

    @property
    def ending(self) -> str:
        """Of its files' names: `push` looks at those without one, so that no trial takes their place."""
        if self.fault is not None:
            return f"-{self.fault}"
        return "" if self.rerun and self.speed == 1 else "-trial"

    @property
    def notebook(self) -> float:
        """Seconds that the kernel took, without what we did around it."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage.startswith("cell "))

    def render(self) -> Table:
        """All but the problems, which the error has; at most 80 wide, with names of usual length."""
        made = table(f"Rehearsal of {self.kernel}" + (f": {self.fault}" if self.fault else ""), "", "")
        if self.fault:
            made.add_row("must come", self.must)
            made.add_row("struck", ", ".join(self.struck))
        made.add_row("image", f"{self.image}, Python {self.python}")
        made.add_row("as", "the hidden rerun" if self.rerun else "a notebook that is saved")
        made.add_row("mounts", ", ".join(self.layouts))
        self._render_time(made)
        made.add_row("memory", _share(self.memory_peak, self.memory_limit))
        made.add_row("working folder", _share(self.disk_peak, self.disk_limit))
        made.add_row("its limit", self.working)
        made.add_row("network", self.network)
        made.add_row("input", self.input)
        made.add_row("other files", self.files)
        self._render_result(made)
        return made

    def _render_time(self, made: Table) -> None:
        for stage, seconds in self.seconds.items():
            made.add_row(stage, f"{seconds:.1f} s")
        at = "" if self.speed == 1 else f" at {self.speed:.3g}x"
        limit = self.hours * 3600
        made.add_row(
            "the kernel", f"{self.notebook:.1f} s of {spoken(limit)}{at}, {self.notebook * self.speed / limit:.0%}"
        )
        for one in self.projections:
            share = f", {one.total / self.deadline:.0%}" if one.judged else ""
            most = "at most " if one.at_most else ""
            found = f"{most}{spoken(one.total)} of {spoken(self.deadline)}{share}"
            made.add_row(f"{one.rows:,} rows " + ("here" if one.at_most else f"on {one.machine}"), found)

    def _render_result(self, made: Table) -> None:
        for bundle in self.parity:
            found = "not scored" if bundle.difference is None else f"{bundle.difference:.0e} of {bundle.tolerance:.0e}"
            made.add_row(f"probes of {bundle.bundle}", found + ("" if bundle.holds else ", FAILED"))
        if self.submission:
            made.add_row("submission", f"{self.submission['rows']:,} rows, ids in the sample's order")
            for name, mean in self.submission["means"].items():
                made.add_row(f"mean {name}", f"{mean:.4f}")
        if self.scored:
            words = f"{self.scored.both:,} in full, {self.scored.one:,} in one order, {self.scored.prior:,} prior"
            made.add_row("rows scored", words)
        made.add_row("verdict", "passed" if self.passed else "NOT PASSED")


@dataclass(frozen=True, slots=True)
class Reports:
    """Those of one call of `rehearse`, in the order of the runs."""

    runs: Sequence[Report]

    @property
    def passed(self) -> bool:
        return all(one.passed for one in self.runs)

    def render(self) -> Group | Table:
        """Of one run all; of several a line for each as well."""
        if len(self.runs) == 1:
            return self.runs[0].render()
        made = table("Faults", "injected", "struck", "must come", "came", "verdict")
        for one in self.runs:
            verdict = "passed" if one.passed else "FAILED"
            made.add_row(one.fault or "nothing", ", ".join(one.struck), one.must, came(one), verdict)
        return Group(*(one.render() for one in self.runs if not one.passed or not one.fault), made)


def came(report: Report) -> str:
    """Of a run, for people."""
    if report.failed:
        return f"{report.failed} failed"
    if not report.submission:
        return "nothing valid"
    if report.scored is None:
        return "priors"
    return f"{report.scored.both + report.scored.one:,} of {report.submission['rows']:,}"


def _share(found: float, limit: float) -> str:
    return f"{found / GB:,.2f} GB of {limit / GB:,.1f} GB, {found / limit:.0%}"


def write_report(folder: Path, report: Report) -> None:
    """Write it beside the results; that of an undisturbed rehearsal, passed or not, to this machine's own too."""
    text = report.model_dump_json(indent=2) + "\n"
    write_text(folder / f"report{report.ending}.json", text)
    if not report.ending:
        write_private(rehearsal_path(report.build), text)


def rehearsal_path(identity: str) -> Path:
    """Where this machine keeps the report of its last rehearsal of a build."""
    return state_folder() / "rehearsals" / f"{identity}.json"


def read_report(path: Path) -> Report:
    """Raises `PackagingError` or `ConfigError` where it is none of this version's."""
    return checked(Report, parse_json(path), path, "rehearse again")


def read_passed(build: Path) -> Report:
    """The report of a rehearsal that passed, without faults, on this machine, for exactly this build.

    Args:
        build: folder of the package, of which the record alone is read.

    Raises:
        PackagingError: there is none, and nothing must be pushed; says why.
    """
    record = read_build(build)
    path, remedy = rehearsal_path(record.identity), f"run `pairclf rehearse {build}`"
    if not is_regular(path):
        there = f"; {REHEARSAL}/{REPORT} in it does not count, as anybody can write that file"
        raise PackagingError(
            f"{build} was never rehearsed on this machine as it is now (build {record.identity[:12]})"
            f"{there if (build / REHEARSAL / REPORT).exists() else ''}",
            where=path,
            remedy=f"{remedy} here, without --commit, --speed and --inject",
        )
    report = read_report(path)
    if report.build != record.identity or report.ending:
        what = "the report is of another build, or not of a hidden rerun without faults"
        raise PackagingError(what, where=path, remedy=remedy)
    if not report.passed or report.problems:
        problems = "".join(f"\n  {problem}" for problem in report.problems)
        raise PackagingError(f"the rehearsal of this build did not pass:{problems}", where=path, remedy=remedy)
    _check_rows(report, path, remedy)
    proven = {one.bundle for one in report.parity if one.holds}
    if unproven := [one.folder for one in record.bundles if one.folder not in proven]:
        raise PackagingError(f"the rehearsal did not prove the logits of {unproven}", where=path, remedy=remedy)
    return report


def _check_rows(report: Report, path: Path, remedy: str) -> None:
    """All of the sample's must have been scored."""
    scored = 0 if report.scored is None else report.scored.both + report.scored.one
    if not report.rows or report.submission.get("rows") != report.rows or scored != report.rows:
        raise PackagingError(f"the rehearsal scored {scored:,} of {report.rows:,} rows", where=path, remedy=remedy)
