"""Probe rows: scored when a bundle is made, and again wherever it is verified."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pairclf.bundles.bundle import Bundle
from pairclf.bundles.manifest import TOLERANCE, Probe
from pairclf.errors import BundleError
from pairclf.scores.metrics import Floats
from pairclf.task import Row

PROBES = 8
"""Rows of a bundle that are scored again."""


def pick_probes(rows: Sequence[Row], logits: Floats) -> list[Probe]:
    """Up to eight rows, from the shortest text to the longest, with their logits in each order, of all `(N, O, C)`."""
    sizes = [sum(len(turn or "") for turns in row.fields.values() for turn in turns) for row in rows]
    ranked = sorted(range(len(rows)), key=lambda row: (sizes[row], row))
    chosen = dict.fromkeys(ranked[round(at)] for at in np.linspace(0, len(ranked) - 1, PROBES))
    return [
        Probe(
            id=rows[row].id,
            fields={name: list(turns) for name, turns in rows[row].fields.items()},
            logits=logits[row].tolist(),
        )
        for row in chosen
    ]


def probe_rows(bundle: Bundle) -> list[Row]:
    """The rows to score again.

    Raises:
        BundleError: the bundle has none.
    """
    if not bundle.manifest.probes:
        raise BundleError("the bundle has no probe rows: nothing shows that it scores as it did", where=bundle.folder)
    return [probe.row() for probe in bundle.manifest.probes]


def difference_of_probes(bundle: Bundle, logits: Floats) -> float:
    """The largest difference of a logit of the probes, scored again as `(P, O, C)`, to those saved."""
    return float(np.abs(np.array([probe.logits for probe in bundle.manifest.probes]) - logits).max())


def tolerance_of(bundle: Bundle, dtype: str) -> float:
    """How far a logit may be off where it is computed in `dtype`: as much as the coarser of the two dtypes allows."""
    return max(TOLERANCE[dtype], TOLERANCE[bundle.manifest.dtype])


def require_close(bundle: Bundle, dtype: str, difference: float) -> None:
    """Raises `BundleError` unless a difference of the probes' logits is within the tolerance."""
    allowed = tolerance_of(bundle, dtype)
    if not difference <= allowed:
        raise BundleError(
            f"probe rows score differently here: a logit is off by {difference:.2g}; {dtype} allows {allowed:.2g}",
            where=bundle.folder,
            rows=[probe.id for probe in bundle.manifest.probes],
            remedy=f"use the versions that the bundle was made with: {bundle.manifest.versions}",
        )
