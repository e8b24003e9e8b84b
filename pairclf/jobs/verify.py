"""Proof that bundles are what was saved: every file's hash, and their probe rows scored again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from pairclf.errors import BundleError, PairclfError
from pairclf.files import write_json
from pairclf.jobs.scoring import difference_of_probes, dtype_of, require_close, tolerance_of
from pairclf.model.backbone import pick_device
from pairclf.model.bundle import open_bundle


class Verified(TypedDict):
    """What one bundle's probe rows gave here."""

    bundle: str
    """Name of its folder."""
    folder: str
    """Its path, as it was given."""
    rows: int
    largest_difference: float | None
    """Of a logit to the one that was saved; None: it is no number."""
    tolerance: float
    """That the dtypes allow."""
    dtype: str
    """That was computed in."""


def verify(folders: Sequence[Path], base: Path | None, out: Path | None) -> Iterator[tuple[Path, Verified]]:
    """Verify bundles, one after the other; yields the folders of those that hold, and what was found.

    Args:
        folders: of the bundles.
        base: folder of the base model on this machine.
        out: JSON file for what was found, of bundles that fail too; those that can't be loaded are not in it.

    Raises:
        BundleError: a file was changed, or a logit is off by more than its dtype allows; all bundles were looked at.
        ModelError, ConfigError: a bundle's base, or its wording, can't be used; likewise.
    """
    found: list[Verified] = []
    errors: list[PairclfError] = []
    for folder in folders:
        try:
            one, error = _look_at(folder, base)
        except PairclfError as unreadable:
            errors.append(unreadable)
            continue
        found.append(one)
        if out is not None:
            write_json(out, found)
        if error is None:
            yield folder, one
        else:
            errors.append(error)
    if errors:
        raise errors[0]


def _look_at(folder: Path, base: Path | None) -> tuple[Verified, BundleError | None]:
    """What a bundle's probes gave, and what is wrong with it. The classifier ends here: there is no room for two."""
    bundle = open_bundle(folder)
    classifier = bundle.load(pick_device(), base)
    difference = difference_of_probes(bundle, classifier)
    one = Verified(
        bundle=folder.name,
        folder=str(folder),
        rows=len(bundle.manifest.probes),
        largest_difference=difference if math.isfinite(difference) else None,
        tolerance=tolerance_of(bundle, classifier),
        dtype=dtype_of(classifier),
    )
    try:
        require_close(bundle, classifier, difference)
    except BundleError as error:
        return one, error.with_traceback(None)  # its frames would keep the classifier alive
    return one, None
