"""Whether a run ended as it must: its submission, its bundles' logits, its rows, its clock."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pairclf.data.tables import check_submission
from pairclf.errors import DataError, PackagingError
from pairclf.files import parsed
from pairclf.packaging.record import Build
from pairclf.rehearsal.faults import STRUCK, Fault
from pairclf.rehearsal.hidden import read_raw
from pairclf.rehearsal.meter import GB
from pairclf.rehearsal.play import SCORES, SERVED, SUBMISSION, VERIFIED
from pairclf.rehearsal.report import Parity, Report, Scored
from pairclf.rehearsal.stage import Stage
from pairclf.task import Task

CHECK = "check"
"""Id of the kernel's first cell."""

SAME = 1e-4
"""A probability may differ so much between two runs whose batches were others."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Looks at what a run left.

    Attributes:
        build: what was run.
        sample: its sample submission.
        fault: what was injected; None: nothing.
        spoiled: by the fault.
        undisturbed: submission of a run without faults, for faults that need one.
    """

    build: Build
    sample: Path
    fault: Fault | None
    spoiled: str
    undisturbed: Path

    @property
    def _serves(self) -> bool:
        return self.build.package.kernel == "server"

    def judge(self, stage: Stage, report: Report) -> None:
        """Fill in what the run gave, its problems and the verdict."""
        report.problems += report.killed
        if self.fault is not None and self.fault.says:
            report.problems += self._first_cell(report)
        else:
            report.problems += self._submission(stage.kept, report)
            report.problems += _clock(report)
        if self.fault is None:
            report.parity = _parity(stage.kept / VERIFIED, self.build)
            report.problems += _unproven(report.parity)
        else:
            report.problems += self._struck(stage, report)
        report.passed = not report.problems

    def _first_cell(self, report: Report) -> Iterator[str]:
        says = "" if self.fault is None else self.fault.says.replace("{spoiled}", re.escape(self.spoiled))
        if report.failed is None:
            yield "the kernel went on as if nothing was wrong"
        elif report.failed != CHECK:
            yield f"the cell {report.failed} failed, and the first one saw nothing"
        elif not re.search(says, report.said):
            yield f"the first cell does not say what is wrong (/{says}/):\n{report.said}"

    def _submission(self, kept: Path, report: Report) -> Iterator[str]:
        if report.failed:
            yield f"the cell {report.failed} failed:\n{report.said}"
        path = kept / SUBMISSION
        if not path.is_file():
            yield f"there is no {SUBMISSION}"
            return
        try:
            report.submission = check_submission(path, self.sample, self.build.task)
        except DataError as error:
            yield f"Kaggle would refuse the submission: {error}"
            return
        if report.failed:
            return
        report.scored = _served(kept / SERVED) if self._serves else _scored(kept / SCORES, self.build.task)
        yield from self._rows(kept, report)
        if self.fault is not None and self.fault.same:
            yield from _differing(path, self.undisturbed)

    def _rows(self, kept: Path, report: Report) -> Iterator[str]:
        """Those that were scored, and those that were not."""
        wanted = "all" if self.fault is None else self.fault.scored
        if report.speed > 1 and wanted == "all":
            wanted = "some"  # a faster clock may leave some out; that it leaves the right ones is not for us to say
        scored, rows = report.scored, report.rows
        if scored is None:
            if wanted == "none":
                yield from _not_of_priors(kept / SUBMISSION)
            else:
                name, program = (SERVED, "the server") if self._serves else (SCORES, "`pairclf predict`")
                yield f"there is no {name}: {program} failed, and what its cell printed says why"
            return
        if (told := scored.both + scored.one + scored.prior) != rows:
            yield f"{told:,} rows are told of, and there are {rows:,}"
        done = scored.both + scored.one
        if wanted == "all" and done < rows:
            yield f"{scored.prior:,} of {rows:,} rows have nothing but the prior"
        elif wanted == "some" and not done:
            yield "no row was scored"
        elif wanted == "none" and done:
            yield f"{done:,} rows were scored, which can't be"
        if not self._serves:
            yield from _odd_priors(kept / SCORES, self.build.task)

    def _struck(self, stage: Stage, report: Report) -> Iterator[str]:
        report.struck = [Path(self.spoiled).name] if self.spoiled else []
        for name in self.fault.strikes if self.fault else ():
            if (stage.home / f"{STRUCK}{name}").exists():
                report.struck.append(name)
            else:
                yield f"the fault never struck ({name}): the run says nothing about it"


def _scored(path: Path, task: Task) -> Scored | None:
    if not path.is_file():
        return None
    orders = pl.read_parquet(path, columns=["orders"])["orders"]
    full = 2 if task.swappable else 1
    both, prior = int((orders >= full).sum()), int((orders == 0).sum())
    return Scored(both=both, one=len(orders) - both - prior, prior=prior)


def _served(path: Path) -> Scored | None:
    """As the kernel's server counted; what could not be scored has the priors, too.

    Raises:
        PackagingError: it is not what `Server.report` gives.
    """
    if not path.is_file():
        return None
    try:
        told = parsed(path.read_text(encoding="utf-8"))
        if "rows" not in told:  # without a model, nobody counted
            return None
        return Scored(both=int(told["both"]), one=int(told["one"]), prior=int(told["priors"]))
    except (ValueError, TypeError, KeyError) as error:
        raise PackagingError(f"{SERVED} is not what `Server.report` gives: {error!r}") from error


def _odd_priors(path: Path, task: Task) -> Iterator[str]:
    """Rows that nothing was scored of must all have the same probabilities."""
    frame = pl.read_parquet(path).filter(pl.col("orders") == 0).select(task.classes)
    if frame.unique().height > 1:
        yield f"{frame.height:,} rows were not scored, and do not have the prior"


def _not_of_priors(path: Path) -> Iterator[str]:
    if read_raw(path).drop("id").unique().height > 1:
        yield "nothing can have been scored, and the submission is not of priors"


def _differing(path: Path, undisturbed: Path) -> Iterator[str]:
    """Rows that another run gave otherwise."""
    here, there = read_raw(path), read_raw(undisturbed)
    if here["id"].to_list() != there["id"].to_list():
        yield "the rows are not those of the undisturbed run"
        return
    for name in here.columns[1:]:
        if here[name].equals(there[name]):
            continue
        numbers = (here[name].cast(pl.Float64, strict=False), there[name].cast(pl.Float64, strict=False))
        worst = (numbers[0] - numbers[1]).abs().max()
        if any(column.null_count() for column in numbers) or not isinstance(worst, int | float):
            yield f"{name} differs from the undisturbed run"
        elif worst > SAME:
            yield f"{name} differs by {worst!r} from the undisturbed run"


def _parity(path: Path, build: Build) -> list[Parity]:
    """What `pairclf verify` found in the kernel; a bundle that it does not name was not scored.

    Raises:
        PackagingError: it is not what `pairclf verify --out` writes.
    """
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        try:
            found = {str(one["bundle"]): one for one in parsed(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, KeyError) as error:
            raise PackagingError(f"{VERIFIED} is not what `pairclf verify` writes: {error!r}") from error
    return [_of_bundle(bundle.folder, found.get(bundle.folder)) for bundle in build.bundles]


def _of_bundle(folder: str, found: dict[str, Any] | None) -> Parity:
    if found is None or found["largest_difference"] is None:
        return Parity(bundle=folder)
    return Parity(
        bundle=folder, rows=found["rows"], difference=found["largest_difference"], tolerance=found["tolerance"]
    )


def _unproven(parity: list[Parity]) -> Iterator[str]:
    for one in parity:
        if one.difference is None:
            yield f"the kernel did not score the probe rows of {one.bundle}"
        elif not one.holds:
            yield f"logits of {one.bundle} differ by {one.difference:.2g}, where {one.tolerance:.2g} is allowed"


def _clock(report: Report) -> Iterator[str]:
    took, limit = report.notebook * report.speed, report.hours * 3600
    if took > limit:
        yield f"the kernel took {took:,.0f} s by its clock, and the competition gives {limit:,.0f} s"
    if report.disk_peak > report.disk_limit:
        yield f"{report.disk_peak / GB:,.2f} GB lay in the working folder"
    for one in report.projections:
        if one.judged and one.total > report.deadline:
            yield (
                f"{one.rows:,} rows take {one.total:,.0f} s on {one.machine}, and the deadline is at "
                f"{report.deadline:,.0f} s: some would not be scored in full"
            )
