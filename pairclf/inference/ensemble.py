"""What predicts: the bundles that were named, or an ensemble's file with weights and calibrations; and their blend.

    members:
      - bundle: runs/a/fold0/bundle      # relative to the file's folder
        weight: 0.6
      - bundle: runs/big/all/bundle
        weight: 0.4
        share: 0.3                       # the most uncertain 30% of the rows
    temperature: 1.02
    mean: geometric                      # of the probabilities; default: arithmetic

`pairclf predict --help` names the command; `MemberFile` and `EnsembleFile` hold every key with its help.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.manifest import Manifest, mean_thresholds
from pairclf.config import MAX_YAML, Config, Data, Section, Submission, checked, override, parse_yaml
from pairclf.config.predict import Predict, Scale
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError, cut, visible
from pairclf.files import read_plain
from pairclf.run import bundles_in, refuse_mixed_bundles
from pairclf.scores.figures import ONE_ORDER
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import Calibration, Mean, blend, has_tie
from pairclf.task import Task

RUN_SETTINGS = ("swap", "layout", "devices", "parallelism", "tokens_per_batch")
"""Settings under `predict` of a run, and not of a member."""

SETTABLE = ("predict.", "model.dtype=", "model.attn_implementation=", "data.test.columns", "data.submission.")
"""Settings that can be overridden without changing the model."""

DEFAULT_SWAP_GAIN = 0.006
"""Default gain of the second order, in nats a row, for bundles that have not measured it: LMSYS' winner had .882 with
one order and .876 with two on the public leaderboard."""

DEFAULT_MEMBER_GAINS = (0.15, 0.004, 0.002)
"""Default gains of the first, the second and each later member over those before it, in nats a row.

The first, over the prior: log 3 = 1.099 against .94 for a public Gemma-2-9b on LMSYS. Later ones: a team's second
model took .893 to .891 there. These are guesses; set `gain` to the gain measured on out-of-fold scores.
"""

SUFFIXES = (".yaml", ".yml")


class CalibrationFile(Section):
    """The keys of a calibration, of a member or of the blend."""

    temperature: Scale | list[Scale] | None = Field(
        None,
        description="the logits are divided by it; with several labels per row also one a label; null: a member's is "
        "its bundle's predict.temperature, that of the blend is 1",
    )
    tie_scale: Scale = Field(
        1.0, description="factor of the distance of a tie's logit from the mean of the sides' logits"
    )
    tie_bias: float = Field(0.0, ge=-1000, le=1000, description="nats that are added to a tie's logit")

    def calibration(self, task: Task, what: object, temperature: float = 1.0) -> Calibration:
        """The calibration; `what` names what it is of, and `temperature` is that of null.

        Raises:
            ConfigError: the task has no tie to be scaled, or not this number of labels.
        """
        if (self.tie_scale, self.tie_bias) != (1, 0) and not has_tie(task):
            raise ConfigError(
                f"tie_scale or tie_bias of {what} changes nothing: task {task.name!r} has no tie of two sides",
                remedy="remove them",
            )
        given = temperature if self.temperature is None else self.temperature
        if isinstance(given, list):
            if not task.multi_label or len(given) != len(task.classes):
                raise ConfigError(
                    f"temperature {given} of {what} must be one number"
                    + (f", or one for each of the {len(task.classes)} labels" if task.multi_label else ""),
                    remedy="take it from `pairclf evaluate` or `blend`",
                )
            return Calibration(tuple(given))
        return Calibration(given, self.tie_scale, self.tie_bias)


def calibration_keys(calibration: Calibration) -> dict[str, Any]:
    """The values of `CalibrationFile`."""
    given = calibration.temperature
    return {**calibration._asdict(), "temperature": list(given) if isinstance(given, tuple) else given}


class MemberFile(CalibrationFile):
    """An entry of `members`."""

    bundle: Path = Field(description="folder of the bundle, relative to this file's")
    weight: float = Field(1.0, ge=1e-9, le=1e9, description="weight of its probabilities in the mean")
    base: Path | None = Field(
        None, description="folder of its base model, relative to this file's; null: as --base says"
    )
    share: float = Field(
        1.0, gt=0, le=1, description="part of the rows that it is for, the most uncertain; the first member takes all"
    )
    swap_share: float = Field(
        1.0, ge=0, le=1, description="part of its rows, the most uncertain, that it scores in both orders; 0: one order"
    )
    gain: float | None = Field(
        None,
        ge=0,
        description="nats a row that it brings over those before it, on all rows, with its share; null: by its place "
        "in the list, times share",
    )


class NestedFigures(Section):
    """What a calibration or a blend is worth: log losses in nats a row, all on the same held-out rows."""

    method: str = Field(description="of the calibration or the blend")
    applied: bool = Field(True, description="whether the models' probabilities have it")
    rows: int = Field(description="number of rows")
    raw: float = Field(description="log loss without it; of a blend, of the best single run")
    nested: float = Field(description="log loss of each row by a fit to rows of other folds, as new rows can expect")
    flattering: float = Field(description="log loss of the fit on the rows that it was fitted to")
    low: float | None = Field(None, description="lower bound of the 95% interval of raw - nested; null: not known")
    high: float | None = Field(None, description="its upper bound")

    @property
    def gain(self) -> float:
        """Nats a row that it gains on rows that it was not fitted to."""
        return self.raw - self.nested


class EnsembleFile(CalibrationFile):
    """The file: members in the order in which they run; the calibration is that of the blend."""

    members: list[MemberFile] = Field(min_length=1, description="the models, in the order in which they run")
    mean: Mean = Field("arithmetic", description="mean of the members' probabilities")
    out_of_fold: dict[str, float] = Field(
        default_factory=dict, description="metrics of the blend on held-out rows, as `pairclf blend` measured them"
    )
    nested: NestedFigures | None = Field(
        None, description="what the blend or the calibration gains, as `blend` or `evaluate --calibrated` measured it"
    )

    @model_validator(mode="after")
    def _first_takes_all(self) -> EnsembleFile:
        if self.members[0].share != 1:
            raise ValueError(
                f"members.0.share={self.members[0].share}: the first member tells which rows are uncertain; set 1"
            )
        return self


@dataclass(frozen=True, slots=True)
class EnsembleMember:
    """A model of the ensemble.

    Attributes:
        name: the bundle's; where several have it, with the member's number in the ensemble.
        bundle: its config has the run's overrides.
        base: folder of the base model on this machine; None: where `model.base` says.
        weight: in the blend.
        calibration: of its logits.
        share: fraction of the rows that it scores, the most uncertain ones.
        gain_member: expected gain of its first order with its share, in nats a row over all rows.
        gain_swap: expected gain of its second order with its shares, in nats a row over all rows.
        swap_share: fraction of its rows that it scores in both orders under `predict.swap=full`.
    """

    name: str
    bundle: Bundle
    base: Path | None
    weight: float
    calibration: Calibration
    share: float
    gain_member: float
    gain_swap: float
    swap_share: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """The models and how they are blended.

    Attributes:
        members: in the order in which they run.
        calibration: of the blend.
        task: of all members.
        settings: `predict` of all members, as far as `RUN_SETTINGS` goes.
        prior: `(C,)`, the weighted mean of the members' priors, for rows without scores.
        mean: of the members' probabilities.
    """

    members: tuple[EnsembleMember, ...]
    calibration: Calibration
    task: Task
    settings: Predict
    prior: Floats
    mean: Mean = "arithmetic"

    @property
    def data(self) -> Data:
        """What test files and submissions call their columns."""
        return self.members[0].bundle.config.data

    @property
    def submission(self) -> Submission:
        """`data.submission`; a label whose threshold it does not set has the weighted mean of the members' ones."""
        settings, members = self.data.settled_submission, self.members
        manifests, weights = [entry.bundle.manifest for entry in members], [entry.weight for entry in members]
        fitted = dict(zip(self.task.classes, mean_thresholds(manifests, weights), strict=False))
        return settings.model_copy(update={"thresholds": fitted | settings.thresholds})

    @property
    def orders(self) -> int:
        """The most orders of a row that a member sees differently."""
        return max(member.bundle.config.orders for member in self.members)

    @property
    def calibrations(self) -> list[Calibration]:
        """Calibration of each member."""
        return [member.calibration for member in self.members]

    def blend(self, per_member: Sequence[Floats]) -> Floats:
        """Blend the members' probabilities, `(N, C)` each, as `probabilities.blend`."""
        weights = [member.weight for member in self.members]
        return blend(
            per_member, self.task, weights=weights, prior=self.prior, calibration=self.calibration, kind=self.mean
        )


def open_ensemble(paths: Sequence[Path], base: Path | None, overrides: Sequence[str]) -> Ensemble:
    """Read the manifests and configs of all members, quickly: no weights are read or hashed.

    The caller verifies the bundles' files before they are loaded (`bundle.verify_files`).

    Args:
        paths: folders of bundles, or one ensemble's YAML file.
        base: folder of the base model, for members that name none.
        overrides: `key=value` for settings in `SETTABLE`, for all members.

    Raises:
        ConfigError: nothing or a file among folders is given, the file can't be used, an override is not settable or is
            contradicted by the file, a bundle is given twice, members differ in a setting of the run, or as
            `refuse_mixed_bundles`.
        BundleError: a folder is no bundle, or one of another task.
    """
    if refused := [entry for entry in overrides if not entry.startswith(SETTABLE)]:
        raise ConfigError(f"{refused} can't be set for a trained bundle", remedy=f"settable: {', '.join(SETTABLE)}")
    file = read_ensemble(paths)
    tempered = [entry.bundle for entry in file.members if entry.temperature is not None]
    if tempered and (set_too := [entry for entry in overrides if entry.startswith("predict.temperature=")]):
        raise ConfigError(
            f"{set_too[0]} is set, and the ensemble's file gives {tempered[0]} a temperature",
            where=paths[0],
            remedy="leave one of the two away",
        )
    members = _told_apart([_open_member(entry, place, base, overrides) for place, entry in enumerate(file.members)])
    refuse_mixed_bundles([member.bundle for member in members])
    task, settings = _common_task(members), _common_settings(members)
    _refuse_idle_swap_shares(file, members, settings)
    prior = np.average(
        [entry.bundle.manifest.prior for entry in members], axis=0, weights=[entry.weight for entry in members]
    )
    return Ensemble(members, file.calibration(task, "the blend"), task, settings, prior, file.mean)


def read_ensemble(paths: Sequence[Path]) -> EnsembleFile:
    """The file, its paths made relative to the current folder; folders alone are members with defaults.

    A run's folder stands for all of its bundles.

    Raises:
        ConfigError: nothing or a file among folders is given, or the file can't be used.
    """
    if not paths:
        raise ConfigError("no bundle is given", remedy="pairclf predict BUNDLE [BUNDLE ...] --data test.csv")
    files = [path for path in paths if path.suffix in SUFFIXES and not path.is_dir()]
    if not files:
        return EnsembleFile(members=[MemberFile(bundle=bundle) for path in paths for bundle in bundles_in(path)])
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
    for entry in file.members:
        entry.bundle = _resolved_beside(path, entry.bundle)
        entry.base = None if entry.base is None else _resolved_beside(path, entry.base)
    return file


def _resolved_beside(file: Path, named: Path) -> Path:
    """A folder that an ensemble's file names. A folder outside the file's own is reported: it may be a mistake, or a
    file from someone else that names your models."""
    folder = file.parent / os.path.expanduser(named)  # Path.expanduser raises for an unknown user
    if not folder.resolve().is_relative_to(file.parent.resolve()):
        console.print(f"note: {file} names a folder outside of its own: {cut(visible(folder))}")
    return folder


def _open_member(entry: MemberFile, place: int, base: Path | None, overrides: Sequence[str]) -> EnsembleMember:
    bundle = open_bundle(entry.bundle, verified=True)
    config = override(bundle.config, overrides)
    default_gain = DEFAULT_MEMBER_GAINS[min(place, len(DEFAULT_MEMBER_GAINS) - 1)]
    return EnsembleMember(
        name=bundle.name,
        bundle=replace(bundle, config=config),
        base=base if entry.base is None else entry.base,
        weight=entry.weight,
        calibration=entry.calibration(config.task, entry.bundle, config.predict.temperature),
        share=entry.share,
        swap_share=entry.swap_share,
        # What was measured, was measured with the share; what is known for all rows counts in part.
        gain_member=default_gain * entry.share if entry.gain is None else entry.gain,
        gain_swap=_gain_swap(config, bundle.manifest)
        * (0.5 if place else 1.0)  # the mean already includes other models
        * (entry.share * entry.swap_share),
    )


def _refuse_idle_swap_shares(file: EnsembleFile, members: Sequence[EnsembleMember], settings: Predict) -> None:
    """Refuse a `swap_share` that changes nothing."""
    for place, (entry, member) in enumerate(zip(file.members, members, strict=True)):
        if entry.swap_share < 1 and (settings.swap != "full" or member.bundle.config.orders == 1):
            why = f"predict.swap={settings.swap}" if settings.swap != "full" else "its rows have one order"
            raise ConfigError(
                f"members.{place}.swap_share={entry.swap_share:g} changes nothing: {why}",
                remedy="remove it; or set predict.swap=full, where rows have two orders",
            )


def _told_apart(members: Sequence[EnsembleMember]) -> tuple[EnsembleMember, ...]:
    """The members, each with a name of its own: progress, plans and tables go by names."""
    counts = Counter(member.name for member in members)
    return tuple(
        replace(member, name=f"{member.name} (member {number})") if counts[member.name] > 1 else member
        for number, member in enumerate(members, start=1)
    )


def _gain_swap(config: Config, manifest: Manifest) -> float:
    """Gain of the second order on held-out rows, if the bundle measured it; 0 if it made the loss worse."""
    if config.orders == 1:
        return 0.0
    one_order, both = (manifest.metrics.get(f"log_loss{suffix}") for suffix in (ONE_ORDER, ""))
    return DEFAULT_SWAP_GAIN if one_order is None or both is None else max(0.0, one_order - both)


def _common_task(members: Sequence[EnsembleMember]) -> Task:
    if len({member.bundle.manifest.seal for member in members}) != len(members):
        raise ConfigError("a bundle is given twice, and would count twice in the mean")
    first = members[0]
    for other in members[1:]:
        if other.bundle.config.task != first.bundle.config.task:
            raise BundleError(
                f"bundles {first.bundle.name} and {other.bundle.name} were trained for different tasks",
                remedy="give bundles of one task with the same classes in the same order",
            )
        if other.bundle.config.data.settled_submission != first.bundle.config.data.settled_submission:
            raise ConfigError(
                f"bundles {first.bundle.name} and {other.bundle.name} differ in data.submission",
                remedy="set it for all, such as data.submission.values=auto data.submission.columns={}",
            )
    return first.bundle.config.task


def _common_settings(members: Sequence[EnsembleMember]) -> Predict:
    """The settings of the run, which all members must share: one planner and one set of workers serve them.

    Raises:
        ConfigError: names a setting, two members and their values.
    """
    first, settings = members[0].bundle, members[0].bundle.config.predict
    for other in (member.bundle for member in members[1:]):
        for name in RUN_SETTINGS:
            value, differing = getattr(settings, name), getattr(other.config.predict, name)
            if value != differing:
                raise ConfigError(
                    f"predict.{name} is {value} in bundle {first.name} and {differing} in {other.name}",
                    remedy=f"a run has one value for all members: predict.{name}=VALUE sets it",
                )
    return settings
