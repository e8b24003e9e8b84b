"""`submit`: the pushed kernel to its competition; waits for the score and writes it into the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairclf.console import console
from pairclf.errors import PackagingError
from pairclf.packaging.record import Build, PackedBundle, read_build
from pairclf.publish import ledger as table
from pairclf.publish.client import Clock, Kaggle
from pairclf.publish.dry import Pretend
from pairclf.publish.push import Pushed, read_pushed
from pairclf.publish.uploads import upload_lock
from pairclf.rehearsal.report import read_passed

_QUEUE = 7200.0  # seconds in which the rerun gets a machine, beside the competition's hours


def submit(
    folder: Path, message: str, *, go: bool, ledger: Path, again: bool = False, clock: Clock | None = None
) -> None:
    """Submit the kernel's version that holds this build, and wait until it is scored.

    A submission of this build, version and message is not made twice: an earlier one is waited for.

    Args:
        folder: what `push` pushed.
        message: shown beside the submission; the build and the version are added to it.
        go: false: print the request and send nothing.
        ledger: gets a line, when the submission is made and again when it is scored.
        again: make another one of the same.
        clock: for waits.

    Raises:
        PackagingError: nothing of this build was pushed; the ledger can't be read; Kaggle refused; the rerun failed, in
            Kaggle's words.
    """
    build = read_build(folder)
    pushed = read_pushed(folder, build)
    assert pushed.output is not None  # read_pushed sees to it
    description = f"{message} [pairclf {build.identity[:12]}, version {pushed.version}]"
    competition = build.package.competition
    if not go:
        table.rows(ledger)
        dry = Kaggle(Clock(), Pretend())
        dry.submit(competition, pushed.kernel, pushed.version, pushed.output, description)
        return
    kaggle, row = Kaggle(clock or Clock()), _row(folder, build, pushed, message)
    table.prepare(ledger)
    with upload_lock(build):

        def make() -> int:
            made = None if again else _made(kaggle.submissions(competition), description) or _noted(ledger, row)
            if made is not None:
                console.print(f"submission {made} is this one already")
                return made
            return kaggle.submit(competition, pushed.kernel, pushed.version, pushed.output or "", description)

        # A second one of the same can't be told from a first one that got lost on its way.
        submission = make() if again else kaggle.again(description, make)
        table.record(ledger, row.model_copy(update={"submission": submission}))
        _score(kaggle, build, submission, ledger)


def _made(submissions: list[Mapping[str, Any]], description: str) -> int | None:
    """The newest submission that says so; one that failed does not count."""
    for one in submissions:
        if one["description"] == description and one["status"] != "ERROR":
            return int(one["ref"])
    return None


def _noted(ledger: Path, row: table.Row) -> int | None:
    """The one in the ledger, as Kaggle's list of submissions may be late."""
    same = (one for one in reversed(table.rows(ledger)) if (one.kernel, one.message) == (row.kernel, row.message))
    return next((one.submission for one in same if one.build == row.build and one.status != "ERROR"), None)


def _score(kaggle: Kaggle, build: Build, submission: int, ledger: Path) -> None:
    def scored() -> Mapping[str, Any] | None:
        found = [one for one in kaggle.submissions(build.package.competition) if one["ref"] == submission]
        return found[0] if found and found[0]["status"] != "PENDING" else None

    one = kaggle.wait(f"the score of submission {submission}", build.package.hours * 3600 + _QUEUE, scored)
    table.update(ledger, submission, one)
    if one["status"] == "ERROR":
        raise PackagingError(
            f"submission {submission} was not scored: {one['errorDescription'] or 'Kaggle does not say why'}",
            remedy="the hidden test differs from the public one: pairclf rehearse with --rows 25000 and --inject",
        )
    console.print(f"submission {submission} is scored: public {one['publicScore'] or 'not shown'}")


def _row(folder: Path, build: Build, pushed: Pushed, message: str) -> table.Row:
    """The ledger's line but for the submission's number; made before it, so that nothing can come between."""
    metrics = {_fold(one, build): one.metrics.get(build.task.metric) for one in build.bundles}
    return table.Row(
        when=table.now(),
        build=build.identity,
        config=build.config,
        competition=build.package.competition,
        metric=build.task.metric,
        folds={fold: value for fold, value in metrics.items() if value is not None},
        out_of_fold=build.out_of_fold,
        seconds=pushed.seconds or read_passed(folder).notebook,
        bundles=[one.seal for one in build.bundles],
        message=message,
        kernel=f"{pushed.kernel}/{pushed.version}",
        submission=0,
    )


def _fold(bundle: PackedBundle, build: Build) -> str:
    """The fold's number, with the bundle's name where several bundles share it."""
    name = "none" if bundle.fold is None else str(bundle.fold)
    return name if [one.fold for one in build.bundles].count(bundle.fold) == 1 else f"{name} {bundle.folder}"
