"""Project the duration of a rehearsed kernel to the hidden test on Kaggle's machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pairclf.console import counted
from pairclf.hardware import MACHINES, PROFILES
from pairclf.inference.forecast import total_seconds
from pairclf.packaging.build_record import Build
from pairclf.rehearsal.mounts import Mount, place
from pairclf.rehearsal.report import Projection, RehearsalReport
from pairclf.task import hidden_rows

PREDICTING = ("cell predict", "cell serve")
"""Stages whose duration grows with the rows."""

LOADING = "cell verify"
"""Stage that takes about as long as loading the models."""

MIN_GROWING_SHARE = 0.1
"""Smallest share of the prediction that is assumed to grow with the rows."""


def project_hidden_test(
    report: RehearsalReport, build: Build, bundles: Sequence[Path], test: Path, rows: int | None, base: Path | None
) -> Iterator[Projection]:
    """Project the duration: from the measured one and, if its profile is known, simulated for Kaggle's machine.

    Args:
        bundles: their folders, or the ensemble's file.
        test: file with rows like the hidden ones.
        rows: of the hidden test; None: `hidden_rows` of the competition.
        base: folder of the base model, if the package attaches one.

    Raises:
        ModelError: the model does not fit on Kaggle's machine.
    """
    rows = max(rows or hidden_rows(build.package.competition), report.rows)
    predict = sum(report.seconds.get(stage, 0.0) for stage in PREDICTING)
    # `verify` also loads the models, and scores few rows: its duration does not grow with the rows.
    growing = max(predict - report.seconds.get(LOADING, 0.0), MIN_GROWING_SHARE * predict)
    rest, profile = report.notebook - predict, MACHINES[build.package.machine_shape].profile
    yield Projection(
        machine="a machine like this",
        rows=rows,
        predict=predict - growing + growing * rows / report.rows,
        rest=rest,
        source=f"{counted(report.rows, 'row')} took {predict:.1f} s, {predict - growing:.1f} s of them to load",
        at_most=True,
        judged=profile is None,
    )
    if profile is not None:
        yield Projection(
            machine=f"{PROFILES[profile].count} x {PROFILES[profile].name}",
            rows=rows,
            predict=total_seconds(bundles, test, device=profile, rows=rows, base=base),
            rest=rest,
            source=f"simulated: {PROFILES[profile].source}",
            judged=True,
        )


def link_bundles(mounts: Sequence[Mount], build: Build, target: Path) -> list[Path]:
    """Put the bundles together from the parts of the payload, by hard links: a bundle may hold no symbolic ones.

    Returns:
        The ensemble's file, or the bundles' folders.
    """
    for mount in mounts:
        if mount.role == "bundle":
            place(mount.files, target)
    return sorted(target.glob("*.yaml")) or [target / bundle.folder for bundle in build.bundles]
