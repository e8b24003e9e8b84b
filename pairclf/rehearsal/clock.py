"""What a rehearsed kernel would take for the hidden test, on Kaggle's machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pairclf.files import link_or_copy
from pairclf.inference.profiles import PROFILES
from pairclf.jobs.forecast import whole
from pairclf.packaging.record import Build
from pairclf.rehearsal.mounts import READ_BY_THE_CLIENT
from pairclf.rehearsal.report import Projection, Report

HIDDEN = 25_000
"""Rows of a hidden test where nothing else is said: LMSYS had about as many."""

PROFILE_OF = {"NvidiaTeslaT4": "t4x2", "NvidiaL4": "l4x4"}
"""Of Kaggle's machines those whose pace is known, and what we call them."""

PREDICTING = ("cell predict", "cell serve")
"""Stages whose seconds grow with the rows."""

LOADING = "cell verify"
"""Stage that takes about as long as they do to load the models."""

LEAST = 0.1
"""At least so much of what predicting takes is taken to grow."""


def project(
    report: Report, build: Build, bundles: Sequence[Path], test: Path, rows: int | None, base: Path | None
) -> Iterator[Projection]:
    """First as measured here, then as `pairclf forecast` simulates Kaggle's machine, where that is known; it judges.

    Args:
        report: of the run.
        build: what was run.
        bundles: their folders, or the ensemble's file.
        test: whose rows stand for the hidden ones.
        rows: how many there will be; None: `HIDDEN`.
        base: folder of the base model, where the package attaches one.

    Raises:
        ModelError: the model does not fit on Kaggle's machine.
    """
    rows = max(rows or HIDDEN, report.rows)
    predict = sum(report.seconds.get(stage, 0.0) for stage in PREDICTING)
    # `verify` loads the models too, and scores next to nothing: what it takes does not grow.
    growing = max(predict - report.seconds.get(LOADING, 0.0), LEAST * predict)
    rest, profile = report.notebook - predict, PROFILE_OF.get(build.package.machine_shape)
    yield Projection(
        machine="a machine like this",
        rows=rows,
        predict=predict - growing + growing * rows / report.rows,
        rest=rest,
        source=f"{report.rows:,} rows took {predict:.1f} s, {predict - growing:.1f} s of them to load",
        at_most=True,
        judged=profile is None,
    )
    if profile is not None:
        yield Projection(
            machine=f"{PROFILES[profile].count} x {PROFILES[profile].name}",
            rows=rows,
            predict=whole(bundles, test, device=profile, rows=rows, base=base),
            rest=rest,
            source=f"simulated: {PROFILES[profile].source}",
            judged=True,
        )


def link_bundles(folder: Path, build: Build, target: Path) -> list[Path]:
    """Put the bundles together from the parts of the payload; by hard links, as a bundle holds no symbolic ones.

    Returns:
        The ensemble's file, or the bundles' folders.
    """
    for part in build.of("bundle"):
        for path in sorted((folder / part.folder).rglob("*")):
            if path.is_file() and path.name not in READ_BY_THE_CLIENT:
                link = target / path.relative_to(folder / part.folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path.resolve(), link)
    return sorted(target.glob("*.yaml")) or [target / bundle.folder for bundle in build.bundles]
