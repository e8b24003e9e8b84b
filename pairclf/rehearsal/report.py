"""The report of a rehearsal, and whether it permits a push.

The report is stored twice: in the package as `rehearsal/report.json`, for people, and in this machine's state folder
under the build's identity. `push` reads the second one, as a package's author could have written the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Group
from rich.table import Table

from pairclf.config import Section, checked
from pairclf.console import counted, table
from pairclf.errors import PackagingError
from pairclf.files import is_regular, write_private, write_text
from pairclf.inference.deadline import format_duration
from pairclf.packaging.build_record import own_note, parse_json, read_build
from pairclf.rehearsal.resource_monitor import GB

REHEARSAL, REPORT = "rehearsal", "report.json"


class Parity(Section):
    """How far the kernel's logits of a bundle's probe rows are from the validated ones."""

    bundle: str = Field(description="its folder in the payload")
    rows: int = Field(0, description="that were scored again")
    difference: float | None = Field(None, description="largest of a logit to the validated one; null: not scored")
    tolerance: float = Field(0.0, description="that its dtype allows")

    @property
    def holds(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance


class ScoredRows(Section):
    """How many rows of the submission have which scores."""

    both_orders: int = Field(description="scored in both orders, or in the only one that a model sees")
    one_order: int = Field(description="scored in one order of two")
    prior: int = Field(description="nothing but the prior")


class Projection(Section):
    """Projected duration of the kernel on another machine, or with more rows, without a deadline."""

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


class RehearsalReport(Section):
    """One run of a package's kernel. Seconds are wall time."""

    pairclf: str = Field(description="version")
    build: str = Field(description="identity of the package")
    kernel: str = Field(description="name of its file")
    fault: str | None = Field(None, description="what was injected; null: nothing")
    expected: str = Field("all rows scored", description="expected result")
    affected: list[str] = Field([], description="what the fault affected")
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
    last_output: str = Field("", description="last lines of that cell")
    submission: dict[str, Any] = Field({}, description="what data.tables.check_submission returned")
    scored: ScoredRows | None = Field(None, description="null: the kernel wrote no scores")
    parity: list[Parity] = Field([], description="bundle by bundle")
    projections: list[Projection] = Field([], description="without a deadline")
    problems: list[str] = Field([], description="all that keeps it from passing")
    passed: bool = Field(False, description="whether it ended as it must")

    @property
    def ending(self) -> str:
        """Suffix of its files' names; only a full rehearsal has none, which `push` accepts."""
        if self.fault is not None:
            return f"-{self.fault}"
        return "" if self.rerun and self.speed == 1 else "-trial"

    @property
    def notebook(self) -> float:
        """Seconds of the kernel's cells."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage.startswith("cell "))

    def render(self) -> Table:
        """A table of everything but the problems, at most 80 wide with names of usual length."""
        summary = table(f"Rehearsal of {self.kernel}" + (f": {self.fault}" if self.fault else ""), "", "")
        for name, value in [*self._setting_rows(), *self._time_rows(), *self._limit_rows(), *self._result_rows()]:
            summary.add_row(name, value)
        return summary

    def _setting_rows(self) -> Iterator[tuple[str, str]]:
        if self.fault:
            yield "expected", self.expected
            yield "affected", ", ".join(self.affected)
        yield "image", f"{self.image}, Python {self.python}"
        yield "as", "the hidden rerun" if self.rerun else "a notebook that is saved"
        yield "mounts", ", ".join(self.layouts)

    def _time_rows(self) -> Iterator[tuple[str, str]]:
        for stage, seconds in self.seconds.items():
            yield stage, f"{seconds:.1f} s"
        limit, at = self.hours * 3600, "" if self.speed == 1 else f" at {self.speed:.3g}x"
        share = f"{self.notebook * self.speed / limit:.0%}"
        yield "the kernel", f"{self.notebook:.1f} s of {format_duration(limit)}{at}, {share}"
        for projection in self.projections:
            place = "here" if projection.at_most else f"on {projection.machine}"
            most = "at most " if projection.at_most else ""
            share = f", {projection.total / self.deadline:.0%}" if projection.judged else ""
            duration = f"{format_duration(projection.total)} of {format_duration(self.deadline)}"
            yield f"{counted(projection.rows, 'row')} {place}", f"{most}{duration}{share}"

    def _limit_rows(self) -> Iterator[tuple[str, str]]:
        yield "memory", _usage(self.memory_peak, self.memory_limit)
        yield "working folder", _usage(self.disk_peak, self.disk_limit)
        yield "its limit", self.working
        yield "network", self.network
        yield "input", self.input
        yield "other files", self.files

    def _result_rows(self) -> Iterator[tuple[str, str]]:
        for bundle in self.parity:
            result = "not scored" if bundle.difference is None else f"{bundle.difference:.0e} of {bundle.tolerance:.0e}"
            yield f"probes of {bundle.bundle}", result + ("" if bundle.holds else ", FAILED")
        if self.submission:
            yield "submission", f"{counted(self.submission['rows'], 'row')}, ids in the sample's order"
            for name, mean in self.submission["means"].items():
                yield f"mean {name}", f"{mean:.4f}"
        if self.scored:
            full, one_order, prior = self.scored.both_orders, self.scored.one_order, self.scored.prior
            yield "rows scored", f"{full:,} in full, {one_order:,} in one order, {prior:,} prior"
        yield "verdict", "passed" if self.passed else "NOT PASSED"


@dataclass(frozen=True, slots=True)
class RehearsalReports:
    """The reports of one call of `rehearse`, in the order of the runs."""

    runs: Sequence[RehearsalReport]

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.runs)

    def render(self) -> Group | Table:
        """One report in full; for several also a table with a line each."""
        if len(self.runs) == 1:
            return self.runs[0].render()
        summary = table("Faults", "injected", "affected", "expected", "actual", "verdict")
        for report in self.runs:
            verdict = "passed" if report.passed else "FAILED"
            summary.add_row(
                report.fault or "nothing", ", ".join(report.affected), report.expected, actual_result(report), verdict
            )
        return Group(*(report.render() for report in self.runs if not report.passed or not report.fault), summary)


def actual_result(report: RehearsalReport) -> str:
    """The actual result of a run, in a few words."""
    if report.failed:
        return f"{report.failed} failed"
    if not report.submission:
        return "nothing valid"
    if report.scored is None:
        return "priors"
    return f"{report.scored.both_orders + report.scored.one_order:,} of {report.submission['rows']:,}"


def _usage(used: float, limit: float) -> str:
    return f"{used / GB:,.2f} GB of {limit / GB:,.1f} GB, {used / limit:.0%}"


def write_report(folder: Path, report: RehearsalReport) -> None:
    """Write a report to the results; that of a full rehearsal, passed or not, also to this machine's state folder."""
    text = report.model_dump_json(indent=2) + "\n"
    write_text(folder / f"report{report.ending}.json", text)
    if not report.ending:
        write_private(own_note("rehearsals", report.build), text)


def read_report(path: Path) -> RehearsalReport:
    """Raises `PackagingError` or `ConfigError` if it is not a report of this version."""
    return checked(RehearsalReport, parse_json(path), path, "rehearse again")


def read_passed(build: Path) -> RehearsalReport:
    """The report of a rehearsal that passed, without faults, on this machine, for exactly this build.

    Args:
        build: folder of the package, of which the record alone is read.

    Raises:
        PackagingError: there is none, and nothing must be pushed; says why.
    """
    record = read_build(build)
    path, remedy = own_note("rehearsals", record.identity), f"run `pairclf rehearse {build}`"
    if not is_regular(path):
        hint = f"; {REHEARSAL}/{REPORT} in it does not count, as anybody can write that file"
        raise PackagingError(
            f"{build} was never rehearsed on this machine as it is now (build {record.identity[:12]})"
            f"{hint if (build / REHEARSAL / REPORT).exists() else ''}",
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
    proven = {entry.bundle for entry in report.parity if entry.holds}
    if unproven := [entry.folder for entry in record.bundles if entry.folder not in proven]:
        raise PackagingError(f"the rehearsal did not prove the logits of {unproven}", where=path, remedy=remedy)
    return report


def _check_rows(report: RehearsalReport, path: Path, remedy: str) -> None:
    """Check that all rows of the sample submission were scored."""
    scored = 0 if report.scored is None else report.scored.both_orders + report.scored.one_order
    if not report.rows or report.submission.get("rows") != report.rows or scored != report.rows:
        raise PackagingError(
            f"the rehearsal scored {scored:,} of {counted(report.rows, 'row')}", where=path, remedy=remedy
        )
