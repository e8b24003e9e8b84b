"""Verify bundles: the hash of every file, and the logits of their probe rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from pairclf.approaches import approach_of
from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.probes import difference_of_probes, require_close, tolerance_of
from pairclf.errors import BundleError, PairclfError
from pairclf.files import write_json


class Verified(TypedDict):
    """The result for one bundle's probe rows."""

    bundle: str
    """Name of its folder."""
    folder: str
    """Its path, as it was given."""
    rows: int
    largest_difference: float | None
    """Largest difference of a logit from the saved one; None: not finite."""
    tolerance: float
    """Difference allowed for the dtypes."""
    dtype: str
    """Dtype computed in."""


def verify(folders: Sequence[Path], base: Path | None, out: Path | None) -> Iterator[tuple[Path, Verified]]:
    """Verify bundles one after the other; yields folder and result of those that pass.

    Args:
        folders: of the bundles.
        base: folder of the base model on this machine.
        out: JSON file for all results, including failures; bundles that can't be loaded are not in it.

    Raises:
        BundleError: a file was changed, or a logit differs by more than its dtype allows; after all bundles.
        ModelError, ConfigError: a bundle's base, or its wording, can't be used; likewise.
    """
    results: list[Verified] = []
    errors: list[PairclfError] = []
    for folder in folders:
        try:
            result, error = _verify_bundle(folder, base)
        except PairclfError as unreadable:
            errors.append(unreadable)
            continue
        results.append(result)
        if out is not None:
            write_json(out, results)
        if error is None:
            yield folder, result
        else:
            errors.append(error)
    if errors:
        raise errors[0]


def _verify_bundle(folder: Path, base: Path | None) -> tuple[Verified, BundleError | None]:
    """Score a bundle's probes; returns the result, and the error if it fails."""
    bundle = open_bundle(folder)
    logits, dtype = approach_of(bundle.config).score_probes(bundle, base)
    difference = difference_of_probes(bundle, logits)
    verified = Verified(
        bundle=folder.name,
        folder=str(folder),
        rows=len(bundle.manifest.probes),
        largest_difference=difference if math.isfinite(difference) else None,
        tolerance=tolerance_of(bundle, dtype),
        dtype=dtype,
    )
    try:
        require_close(bundle, dtype, difference)
    except BundleError as error:
        return verified, error
    return verified, None
