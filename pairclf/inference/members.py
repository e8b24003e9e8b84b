"""What predicts: the bundles that were named, or an ensemble's file with weights and temperatures; and their blend.

    members:
      - bundle: runs/a/fold0/bundle      # relative to the file's folder
        weight: 0.6
      - bundle: runs/big/all/bundle
        weight: 0.4
        share: 0.3                       # the most uncertain 30% of the rows
    temperature: 1.02

`pairclf predict --help` names the command; `MemberFile` and `EnsembleFile` hold every key with its help.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pairclf.config import MAX_YAML, Config, Section, checked, override, parse_yaml
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError, cut, visible
from pairclf.files import read_plain
from pairclf.model.bundle import Manifest, open_bundle
from pairclf.scores.calibration import apply_temperature
from pairclf.task import Task

Floats = NDArray[np.float64]

SETTABLE = ("predict.", "model.dtype=", "model.attention=")
"""Overrides that leave a bundle the model that it is."""

GAIN_SWAP = 0.006
"""Nats a row that the second order brings where a bundle has not measured it: LMSYS' winner had .882 with one order and
.876 with two on the public leaderboard."""

GAIN_MEMBER = (0.15, 0.004, 0.002)
"""Nats a row that the first, the second and each later member is expected to bring on top of those before it.

The first over the prior: log 3 = 1.099 against the .94 of a public Gemma-2-9b on LMSYS. Later ones: a team's second
model there, over one with both orders and 3,072 tokens, took .893 to .891, and a larger one, which is what is worth a
cascade, brings more; a guess, which `gain` replaces by what out-of-fold scores say.
"""

SUFFIXES = (".yaml", ".yml")


class MemberFile(Section):
    """An entry of `members`."""

    bundle: Path = Field(description="folder of the bundle, relative to this file's")
    weight: float = Field(1.0, gt=0, description="weight of its probabilities in the mean")
    temperature: float | None = Field(
        None, gt=0, description="its logits are divided by it; null: the bundle's predict.temperature"
    )
    base: Path | None = Field(
        None, description="folder of its base model, relative to this file's; null: as --base says"
    )
    share: float = Field(
        1.0, gt=0, le=1, description="part of the rows that it is for, the most uncertain; the first member takes all"
    )
    gain: float | None = Field(None, ge=0, description="nats a row that it brings; null: by its place in the list")


class EnsembleFile(Section):
    """The file: members in the order in which they run."""

    members: list[MemberFile] = Field(min_length=1, description="the models, in the order in which they run")
    temperature: float = Field(1.0, gt=0, description="of the blend; above 1: less sure")

    @model_validator(mode="after")
    def _first_takes_all(self) -> EnsembleFile:
        if self.members[0].share != 1:
            raise ValueError(
                f"members.0.share={self.members[0].share}: the first member tells which rows are uncertain; set 1"
            )
        return self


@dataclass(frozen=True, slots=True)
class Member:
    """A model of the ensemble.

    Attributes:
        folder: of the bundle.
        manifest: of the bundle.
        config: the bundle's, with the run's overrides.
        base: folder of the base model on this machine; None: where `model.base` says.
        weight: in the blend.
        temperature: its logits are divided by it.
        share: part of the rows that it is for, the most uncertain.
        gain_member: nats a row that one order of it is expected to bring.
        gain_swap: nats a row that its second order is expected to bring on top.
    """

    folder: Path
    manifest: Manifest
    config: Config
    base: Path | None
    weight: float
    temperature: float
    share: float
    gain_member: float
    gain_swap: float


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """What predicts.

    Attributes:
        members: in the order in which they run.
        temperature: of the blend.
        task: of all members.
        prior: `(C,)`, the weighted mean of the members' priors.
    """

    members: tuple[Member, ...]
    temperature: float
    task: Task
    prior: Floats

    @property
    def temperatures(self) -> list[float]:
        """One a member."""
        return [member.temperature for member in self.members]

    def blended(self, per_member: Sequence[Floats]) -> Floats:
        """As the function `blended`."""
        return blended(per_member, self)


def open_ensemble(paths: Sequence[Path], base: Path | None, overrides: Sequence[str]) -> Ensemble:
    """Read the manifests and configs of all members; no weight is read and hashed, so that it takes no time.

    The bundles' files are not proven by this: whoever loads one does it (`open_bundle`).

    Args:
        paths: folders of bundles, or one ensemble's YAML file.
        base: folder of the base model, for members that name none.
        overrides: `key=value` for settings in `SETTABLE`, for all members.

    Raises:
        ConfigError: nothing or a file among folders is given, the file can't be used, an override is not settable or is
            contradicted by the file, a bundle is given twice.
        BundleError: a folder is no bundle, or one of another task.
    """
    if refused := [one for one in overrides if not one.startswith(SETTABLE)]:
        raise ConfigError(f"{refused} can't be set for a trained bundle", remedy=f"settable: {', '.join(SETTABLE)}")
    file = read_ensemble(paths)
    tempered = [one.bundle for one in file.members if one.temperature is not None]
    if tempered and (set_too := [one for one in overrides if one.startswith("predict.temperature=")]):
        raise ConfigError(
            f"{set_too[0]} is set, and the ensemble's file gives {tempered[0]} a temperature",
            where=paths[0],
            remedy="leave one of the two away",
        )
    members = tuple(_open(one, place, base, overrides) for place, one in enumerate(file.members))
    task = _agreed(members)
    prior = np.average([one.manifest.prior for one in members], axis=0, weights=[one.weight for one in members])
    return Ensemble(members, file.temperature, task, prior)


def read_ensemble(paths: Sequence[Path]) -> EnsembleFile:
    """The file, its paths made relative to the current folder; folders alone are members with defaults.

    Raises:
        ConfigError: nothing or a file among folders is given, or the file can't be used.
    """
    if not paths:
        raise ConfigError("no bundle is given", remedy="pairclf predict BUNDLE [BUNDLE ...] --data test.csv")
    files = [path for path in paths if path.suffix in SUFFIXES and not path.is_dir()]
    if not files:
        return EnsembleFile(members=[MemberFile(bundle=path) for path in paths])
    if len(paths) > 1:
        raise ConfigError(f"{files[0]} is an ensemble's file and must be given alone", remedy="name the bundles in it")
    path = files[0]
    try:
        text = read_plain(path, MAX_YAML)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be read: {cut(error)}", remedy="give bundle folders, or a YAML file"
        ) from error
    tree = parse_yaml(text, path)
    if isinstance(tree, dict) and "members" not in tree and tree.keys() & Config.model_fields.keys():
        raise ConfigError(
            f"{path} is the config of a run, and not an ensemble's file: it has no `members`",
            remedy="give bundles, such as RUN/fold0/bundle, or an ensemble's file (docs/export.md)",
        )
    file = checked(EnsembleFile, tree, path, "docs/export.md shows an ensemble's file")
    for one in file.members:
        one.bundle = _beside(path, one.bundle)
        one.base = None if one.base is None else _beside(path, one.base)
    return file


def _beside(file: Path, named: Path) -> Path:
    """A folder that an ensemble's file names. One that is not below the file's own folder is said: it may be a slip, or
    a stranger's file that leads to models of yours."""
    folder = file.parent / os.path.expanduser(named)  # Path's own raises for a user who is not there
    if not folder.resolve().is_relative_to(file.parent.resolve()):
        console.print(f"note: {file} names a folder outside of its own: {cut(visible(folder))}")
    return folder


def _open(given: MemberFile, place: int, base: Path | None, overrides: Sequence[str]) -> Member:
    opened = open_bundle(given.bundle, proven=True)
    config = override(opened.config, overrides)
    usual = GAIN_MEMBER[min(place, len(GAIN_MEMBER) - 1)]
    return Member(
        folder=given.bundle,
        manifest=opened.manifest,
        config=config,
        base=base if given.base is None else given.base,
        weight=given.weight,
        temperature=config.predict.temperature if given.temperature is None else given.temperature,
        share=given.share,
        gain_member=usual if given.gain is None else given.gain,
        gain_swap=_gain_swap(config, opened.manifest) * (0.5 if place else 1.0),  # of a mean that has views already
    )


def _gain_swap(config: Config, manifest: Manifest) -> float:
    """What the second order brought on held-out rows, where the bundle knows; swapping that hurt brings nothing."""
    if not config.task.swappable:
        return 0.0
    one, both = (manifest.metrics.get(name) for name in ("log_loss_one_order", "log_loss"))
    return GAIN_SWAP if one is None or both is None else max(0.0, one - both)


def _agreed(members: Sequence[Member]) -> Task:
    if len({one.manifest.seal for one in members}) != len(members):
        raise ConfigError("a bundle is given twice, and would count twice in the mean")
    first = members[0]
    for other in members[1:]:
        if other.config.task != first.config.task:
            raise BundleError(
                f"bundles {first.manifest.name} and {other.manifest.name} were trained for different tasks",
                remedy="give bundles of one task with the same classes in the same order",
            )
    return first.config.task


def blended(per_member: Sequence[Floats], ensemble: Ensemble) -> Floats:
    """One probability `(N, C)` a row and class, finite, whatever is known so far.

    A row's mean is over the members that know it, their weights shared anew among them; then comes the blend's
    temperature. The prior stands where nobody knows a row. Rows sum to one, unless the task has several labels a row.

    Args:
        per_member: `(N, C)` a member, in their order; NaN anywhere in a row: not known (yet).
        ensemble: their weights, the temperature, the prior.
    """
    given, weights = np.stack(per_member), np.array([one.weight for one in ensemble.members])
    known = np.asarray(np.isfinite(given).all(axis=2))  # (M, N)
    shares = weights[:, None] * known
    anybody = known.any(axis=0)  # (N,)
    sums = np.einsum("mn,mnc->nc", shares, np.where(known[:, :, None], given, 0.0))
    result = np.tile(ensemble.prior, (given.shape[1], 1))
    result[anybody] = sums[anybody] / shares.sum(axis=0)[anybody, None]
    if not ensemble.task.multi_label:
        result /= result.sum(axis=1, keepdims=True)
    if ensemble.temperature != 1:
        result[anybody] = apply_temperature(result[anybody], ensemble.temperature, ensemble.task)
    return result
