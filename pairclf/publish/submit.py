"""`submit`: submit the pushed kernel to its competition, wait for the score, and write it into the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairclf.console import console
from pairclf.errors import PackagingError
from pairclf.packaging.build_record import Build, PackedBundle, read_build
from pairclf.publish import ledger as table
from pairclf.publish.client import KaggleClient, WaitClock
from pairclf.publish.dry_run import DryRun
from pairclf.publish.push import Pushed, read_pushed
from pairclf.publish.uploads import upload_lock
from pairclf.rehearsal.report import read_passed
from pairclf.task import hidden_rows

_QUEUE = 7200.0  # seconds in which the rerun gets a machine, beside the competition's hours


def submit(
    folder: Path, message: str, *, go: bool, ledger: Path, again: bool = False, clock: WaitClock | None = None
) -> None:
    """Submit the kernel's version that holds this build, and wait for its score.

    A submission of this build, version and message is not made twice: an earlier one is waited for.

    Args:
        message: shown beside the submission; the build and the version are added to it.
        go: false: print the request and send nothing.
        ledger: gets a line when the submission is made, and again when it is scored.
        again: submit the same once more.

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
        dry = KaggleClient(WaitClock(), DryRun())
        dry.submit(competition, pushed.kernel, pushed.version, pushed.output, description)
        return
    kaggle, row = KaggleClient(clock or WaitClock()), _row(folder, build, pushed, message)
    table.prepare(ledger)
    with upload_lock(build):

        def make() -> int:
            existing = (
                None
                if again
                else _submission_of(kaggle.submissions(competition), description) or _submission_in_ledger(ledger, row)
            )
            if existing is not None:
                console.print(f"submission {existing} is this one already")
                return existing
            return kaggle.submit(competition, pushed.kernel, pushed.version, pushed.output or "", description)

        # A second one of the same can't be told from a first one that got lost on its way.
        submission = make() if again else kaggle.retry(description, make)
        table.record(ledger, row.model_copy(update={"submission": submission}))
        _wait_for_score(kaggle, build, submission, ledger)


def _submission_of(submissions: list[Mapping[str, Any]], description: str) -> int | None:
    """The newest submission with this description that did not fail."""
    for entry in submissions:
        if entry["description"] == description and entry["status"] != "ERROR":
            return int(entry["ref"])
    return None


def _submission_in_ledger(ledger: Path, row: table.LedgerRow) -> int | None:
    """The submission's number in the ledger: Kaggle's list may lag behind."""
    same = (
        entry for entry in reversed(table.rows(ledger)) if (entry.kernel, entry.message) == (row.kernel, row.message)
    )
    return next((entry.submission for entry in same if entry.build == row.build and entry.status != "ERROR"), None)


def _wait_for_score(kaggle: KaggleClient, build: Build, submission: int, ledger: Path) -> None:
    def scored() -> Mapping[str, Any] | None:
        matches = [result for result in kaggle.submissions(build.package.competition) if result["ref"] == submission]
        return matches[0] if matches and matches[0]["status"] != "PENDING" else None

    result = kaggle.wait(f"the score of submission {submission}", build.package.limit + _QUEUE, scored)
    table.update(ledger, submission, result)
    if result["status"] == "ERROR":
        raise PackagingError(
            f"submission {submission} was not scored: {result['errorDescription'] or 'Kaggle does not say why'}",
            remedy="the hidden test differs from the public one: pairclf rehearse with --rows "
            f"{hidden_rows(build.package.competition)} and --inject",
        )
    console.print(f"submission {submission} is scored: public {result['publicScore'] or 'not shown'}")


def _row(folder: Path, build: Build, pushed: Pushed, message: str) -> table.LedgerRow:
    """The ledger's line without the submission's number. It is made first, so that nothing fails after submitting."""
    metrics = {_fold(bundle, build): bundle.metrics.get(build.task.metric) for bundle in build.bundles}
    return table.LedgerRow(
        when=table.now(),
        build=build.identity,
        config=build.config,
        competition=build.package.competition,
        metric=build.task.metric,
        folds={fold: value for fold, value in metrics.items() if value is not None},
        out_of_fold=build.out_of_fold,
        nested=build.nested,
        seconds=pushed.seconds or read_passed(folder).notebook,
        bundles=[bundle.seal for bundle in build.bundles],
        message=message,
        kernel=f"{pushed.kernel}/{pushed.version}",
        submission=0,
    )


def _fold(bundle: PackedBundle, build: Build) -> str:
    """The fold's number, with the bundle's name if several bundles share it."""
    name = "none" if bundle.fold is None else str(bundle.fold)
    return name if [other.fold for other in build.bundles].count(bundle.fold) == 1 else f"{name} {bundle.folder}"
