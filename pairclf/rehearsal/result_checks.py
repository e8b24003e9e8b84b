"""Check the result of a rehearsed run: submission, logits of the bundles, scored rows, time and disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pairclf.console import counted
from pairclf.data.submission import check_submission
from pairclf.errors import DataError, PackagingError
from pairclf.files import parsed
from pairclf.packaging.build_record import Build
from pairclf.rehearsal.faults import MARKER_PREFIX, InjectedFault
from pairclf.rehearsal.hidden_test import read_raw
from pairclf.rehearsal.kernel_run import SCORES, SERVED, SUBMISSION, VERIFIED
from pairclf.rehearsal.report import Parity, RehearsalReport, ScoredRows
from pairclf.rehearsal.resource_monitor import GB
from pairclf.rehearsal.workspace import Workspace

FIRST_CELL = "check"
"""Id of the kernel's first cell."""

MAX_DIFFERENCE = 1e-4
"""Largest difference of a probability between two runs with different batches."""


@dataclass(frozen=True, slots=True)
class RunChecks:
    """Checks the results of a run; `spoiled`: by the fault; `undisturbed`: submission of a run without faults."""

    build: Build
    sample: Path
    fault: InjectedFault | None
    spoiled: str
    undisturbed: Path

    @property
    def _serves(self) -> bool:
        return self.build.package.kernel_type == "server"

    @property
    def _row_id(self) -> str:
        return self.build.submission.id or "id"

    def check(self, workspace: Workspace, report: RehearsalReport) -> None:
        """Fill in results, problems and verdict of the report."""
        report.problems += report.killed
        if self.fault is not None and self.fault.error_pattern:
            report.problems += self._first_cell_problems(report)
        else:
            report.problems += self._submission_problems(workspace.results_folder, report)
            report.problems += _limit_problems(report)
        if self.fault is None:
            report.parity = _parity_of_bundles(workspace.results_folder / VERIFIED, self.build)
            report.problems += _parity_problems(report.parity)
        else:
            report.problems += self._fault_problems(workspace, report)
        report.passed = not report.problems

    def _first_cell_problems(self, report: RehearsalReport) -> Iterator[str]:
        says = "" if self.fault is None else self.fault.error_pattern.replace("{spoiled}", re.escape(self.spoiled))
        if report.failed is None:
            yield "the first cell did not detect the fault, and the kernel continued"
        elif report.failed != FIRST_CELL:
            yield f"the cell {report.failed} failed, and the first cell did not detect the fault"
        elif not re.search(says, report.last_output):
            yield f"the first cell's error does not match /{says}/:\n{report.last_output}"

    def _submission_problems(self, kept: Path, report: RehearsalReport) -> Iterator[str]:
        if report.failed:
            yield f"the cell {report.failed} failed:\n{report.last_output}"
        path = kept / SUBMISSION
        if not path.is_file():
            yield f"there is no {SUBMISSION}"
            return
        try:
            report.submission = check_submission(path, self.sample, self.build.task, self.build.submission)
        except DataError as error:
            yield f"Kaggle would refuse the submission: {error}"
            return
        if report.failed:
            return
        count = _served if self._serves else _scored
        report.scored = count(kept / (SERVED if self._serves else SCORES), self.build.orders)
        yield from self._row_problems(kept, report)
        if self.fault is not None and self.fault.same_scores:
            yield from _differences(path, self.undisturbed, self._row_id)

    def _row_problems(self, kept: Path, report: RehearsalReport) -> Iterator[str]:
        """Check how many rows were scored."""
        expected = "all" if self.fault is None else self.fault.scored
        if report.speed > 1 and expected == "all":
            expected = "some"  # at a faster clock, some rows may be left for lack of time
        scored, rows = report.scored, report.rows
        if scored is None:
            if expected != "none":
                name, program = (SERVED, "the server") if self._serves else (SCORES, "`pairclf predict`")
                yield f"there is no {name}: {program} failed, see the output of its cell"
            elif read_raw(kept / SUBMISSION).drop(self._row_id).unique().height > 1:
                yield "no row can have been scored, but the submission is not the prior"
            return
        if (total := scored.both_orders + scored.one_order + scored.prior) != rows:
            yield f"the scores are of {counted(total, 'row')}, and the sample submission has {rows:,}"
        scored_rows = scored.both_orders + scored.one_order
        if expected == "all" and scored_rows < rows:
            yield f"{scored.prior:,} of {rows:,} rows have nothing but the prior"
        elif expected == "some" and not scored_rows:
            yield "no row was scored"
        elif expected == "none" and scored_rows:
            yield f"{counted(scored_rows, 'row was', 'rows were')} scored, which can't be"
        if not self._serves:
            unscored = pl.read_parquet(kept / SCORES).filter(pl.col("orders") == 0).select(self.build.task.classes)
            if unscored.unique().height > 1:
                yield f"{unscored.height:,} rows were not scored, and do not all have the prior"

    def _fault_problems(self, workspace: Workspace, report: RehearsalReport) -> Iterator[str]:
        report.affected = [Path(self.spoiled).name] if self.spoiled else []
        for name in self.fault.markers if self.fault else ():
            if (workspace.home / f"{MARKER_PREFIX}{name}").exists():
                report.affected.append(name)
            else:
                yield f"the fault never struck ({name}): the run says nothing about it"


def _scored(path: Path, full: int) -> ScoredRows | None:
    """How many rows have scores; `full`: orders of a row that is scored in full."""
    if not path.is_file():
        return None
    orders = pl.read_parquet(path, columns=["orders"])["orders"]
    both, prior = int((orders >= full).sum()), int((orders == 0).sum())
    return ScoredRows(both_orders=both, one_order=len(orders) - both - prior, prior=prior)


def _served(path: Path, full: int) -> ScoredRows | None:
    """The statistics of the kernel's server; failed rows count as priors. `full`: as for `_scored`.

    Raises:
        PackagingError: the file is not what `Server.report` writes.
    """
    if not path.is_file():
        return None
    try:
        statistics = parsed(path.read_text(encoding="utf-8"))
        if "rows" not in statistics:  # no model could be loaded
            return None
        both, one, priors = (int(statistics[name]) for name in ("both", "one", "priors"))
        return ScoredRows(both_orders=both + one * (full == 1), one_order=one * (full > 1), prior=priors)
    except (ValueError, TypeError, KeyError) as error:
        raise PackagingError(f"{SERVED} is not what `Server.report` gives: {error!r}") from error


def _differences(path: Path, undisturbed: Path, row_id: str) -> Iterator[str]:
    """Differences from the undisturbed run."""
    actual, expected = read_raw(path), read_raw(undisturbed)
    if actual[row_id].to_list() != expected[row_id].to_list():
        yield "the rows are not those of the undisturbed run"
        return
    for name in actual.columns:
        if actual[name].equals(expected[name]):
            continue
        numbers = (actual[name].cast(pl.Float64, strict=False), expected[name].cast(pl.Float64, strict=False))
        worst = (numbers[0] - numbers[1]).abs().max()
        if any(column.null_count() for column in numbers) or not isinstance(worst, int | float):
            yield f"{name} differs from the undisturbed run"
        elif worst > MAX_DIFFERENCE:
            yield f"{name} differs by {worst!r} from the undisturbed run"


def _parity_of_bundles(path: Path, build: Build) -> list[Parity]:
    """The results of `pairclf verify` in the kernel; a bundle without a result was not scored.

    Raises:
        PackagingError: the file is not what `pairclf verify --out` writes.
    """
    results: dict[str, dict[str, Any]] = {}
    if path.is_file():
        try:
            results = {str(result["bundle"]): result for result in parsed(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, KeyError) as error:
            raise PackagingError(f"{VERIFIED} is not what `pairclf verify` writes: {error!r}") from error
    parity = []
    for bundle in build.bundles:
        result, scored = results.get(bundle.folder), {}
        if result is not None and result["largest_difference"] is not None:
            scored = {
                "rows": result["rows"],
                "difference": result["largest_difference"],
                "tolerance": result["tolerance"],
            }
        parity.append(Parity(bundle=bundle.folder, **scored))
    return parity


def _parity_problems(parity: list[Parity]) -> Iterator[str]:
    for probes in parity:
        if probes.difference is None:
            yield f"the kernel did not score the probe rows of {probes.bundle}"
        elif not probes.holds:
            yield f"logits of {probes.bundle} differ by {probes.difference:.2g}; {probes.tolerance:.2g} is allowed"


def _limit_problems(report: RehearsalReport) -> Iterator[str]:
    seconds, limit = report.notebook * report.speed, report.hours * 3600
    if seconds > limit:
        yield f"the kernel took {seconds:,.0f} s by its clock; the competition's limit is {limit:,.0f} s"
    if report.disk_peak > report.disk_limit:
        yield f"{report.disk_peak / GB:,.2f} GB lay in the working folder"
    for projection in report.projections:
        if projection.judged and projection.total > report.deadline:
            rows = counted(projection.rows, "row takes", "rows take")
            yield (
                f"{rows} {projection.total:,.0f} s on {projection.machine}, and the deadline is at "
                f"{report.deadline:,.0f} s: some would not be scored in full"
            )
