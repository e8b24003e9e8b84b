"""The manifest of a bundle: what it is, the hash of every file, and how it scored when it was made.

Whoever shares a bundle can seal what he likes: the seal shows a damaged or half-changed manifest, and no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pairclf.bundles.contents import MANIFEST, refuse_unknown
from pairclf.errors import BundleError, cut, quoted
from pairclf.files import read_plain, write_json
from pairclf.task import Row

FORMAT = 6
MAX_MANIFEST = 64 << 20
"""Bytes of a manifest."""

Weights = Literal["adapter", "whole", "base", "none"]
"""Where the weights of a bundle's language model lie.

adapter: an adapter in the bundle, over a base elsewhere; whole: all of them in the bundle; base: all of them elsewhere,
untouched; none: it has no language model.
"""

TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest difference of a probe's logits between the machine that made a bundle and the one that loads it.

Wider than between two layouts on one machine (1e-5 and 2e-2): another CPU or GPU sums in another order.
"""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds characters that can't be printed")
    return text


def _dtype(name: str) -> str:
    if name not in TOLERANCE:
        raise ValueError(f"it must be one of {', '.join(TOLERANCE)}")
    return name


_Name = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """A row that was scored when the bundle was made: `logits[order]` is `(C,)`, as the model gave them."""

    __pydantic_config__ = _STRICT

    id: str
    fields: dict[str, list[str | None]]
    logits: list[list[float]]

    def row(self) -> Row:
        return Row(self.id, {name: tuple(turns) for name, turns in self.fields.items()})


@dataclass(frozen=True, slots=True)
class Manifest:
    """`bundle.json`.

    Attributes:
        approach: key of `approaches.APPROACHES`: how rows become logits.
        weights: where those of its language model lie.
        needs_base: whether the files of `base` must be at hand to load it.
        base: `model.base` of its config, and its fingerprint; None where `weights` is none.
        dtype: of the logits that the probes keep.
        prior: mean target `(C,)` of the training rows: what to say of a row that could not be scored.
        thresholds: `(C,)` with several labels a row, for the best macro F1 on the held-out rows; empty: there are none.
        seal: SHA-256 of all the other fields, so that a changed manifest shows.
    """

    __pydantic_config__ = _STRICT

    format: int
    name: _Name
    fold: Annotated[int, Field(ge=0)] | None
    approach: _Name
    weights: Weights
    needs_base: bool
    base: _Name | None
    base_fingerprint: _Name | None
    dtype: Annotated[str, AfterValidator(_dtype)]
    classes: list[_Name]
    metrics: dict[_Name, float]
    prior: list[Annotated[float, Field(ge=0, le=1)]]
    versions: dict[_Name, _Name]
    files: dict[_Name, _Name]
    probes: list[Probe]
    thresholds: list[Annotated[float, Field(ge=0, le=1)]] = field(default_factory=list)
    seal: str = ""

    def write(self, folder: Path) -> None:
        """Write it into a bundle's folder, sealed anew."""
        tree = asdict(self)
        if not self.thresholds:  # an older pairclf refuses a field that it does not know
            del tree["thresholds"]
        write_json(folder / MANIFEST, tree | {"seal": seal_of(tree)})


def seal_of(tree: Mapping[str, Any]) -> str:
    """The `seal` of a manifest with these fields."""
    plain = {name: value for name, value in tree.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def amend(folder: Path, *, metrics: dict[str, float], probes: Sequence[Probe]) -> None:
    """Let the manifest say how the bundle scores, where that was found out after it was written; the files stay."""
    replace(read_manifest(folder), metrics=metrics, probes=list(probes)).write(folder)


def mean_thresholds(manifests: Sequence[Manifest], weights: Sequence[float] | None = None) -> list[float]:
    """The mean of the thresholds `(C,)` of those bundles that have some, by weight; empty: none has."""
    weights = weights or [1.0] * len(manifests)
    fitted = [(manifest.thresholds, weight) for manifest, weight in zip(manifests, weights, strict=True)]
    fitted = [(thresholds, weight) for thresholds, weight in fitted if thresholds and weight]
    total = sum(weight for _, weight in fitted)
    columns = zip(*([weight / total * value for value in thresholds] for thresholds, weight in fitted), strict=True)
    return [sum(column) for column in columns]


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest, proven by its seal; its files are not looked at, so that it takes no time.

    Raises:
        BundleError: there is none, it was changed, its format is another, or the folder holds other things too.
    """
    path = folder / MANIFEST
    below = [
        str(found.parent) for found in sorted(folder.glob(f"*/*/{MANIFEST}")) or sorted(folder.glob(f"*/{MANIFEST}"))
    ]
    named = f"of those below it: {' '.join(below[:5])}" if below else "such as RUN/fold0/bundle, copied whole"
    remedy = f"give a bundle's folder, {named}"
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it holds no {MANIFEST}", remedy=remedy)
    refuse_unknown(folder)
    try:
        text = read_plain(path, MAX_MANIFEST)
        tree = json.loads(text)
        if isinstance(tree, dict) and tree.get("format") == FORMAT:
            manifest, seal = _MANIFEST.validate_json(text), seal_of(tree)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is damaged: {_why(error)}", where=path, remedy=remedy) from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        fields = tree if isinstance(tree, dict) else {}
        raise BundleError(
            f"the bundle has format {quoted(fields.get('format'))}, this pairclf reads format {FORMAT}",
            where=path,
            remedy="train it again with this pairclf, or use it with the version of pairclf that wrote it",
        )
    if manifest.seal != seal:
        raise BundleError(f"{MANIFEST} was changed after it was written", where=path, remedy=remedy)
    return manifest


_MANIFEST = TypeAdapter(Manifest)


def _why(error: Exception) -> str:
    """The first thing that is wrong with a manifest."""
    if not isinstance(error, ValidationError):
        return cut(error)
    first = error.errors()[0]
    return f"{cut('.'.join(map(str, first['loc'])))}: {cut(first['msg'])} (given: {quoted(first['input'])})"
