"""Sweep settings: train a run for each combination of values, and say which effects exceed the noise.

    config: ../recipes/arxiv-2512.12677-head.yaml     # relative to this file
    axes:
      - {model.lora.r: [8, 16], model.lora.lora_alpha: [16, 32]}     # together: their values go in step
      - {seed: [0, 1]}
    folds: [0]

All runs of a sweep share its folds, so their held-out rows are the same, and differences are paired.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator
from rich.table import Table

from pairclf.config import MAX_YAML, Config, Section, checked, load_config, parse_yaml
from pairclf.console import Tables, console, counted, number, table
from pairclf.errors import ConfigError, quoted
from pairclf.files import read_plain, write_json
from pairclf.own_files import or_shipped
from pairclf.run import (
    FOLDS,
    TRAINING,
    Paths,
    Run,
    check_training,
    copy_folds,
    output_of,
    trained_as,
    trained_otherwise,
    variant_name,
)
from pairclf.runs.compare import half_width, minus, verdict
from pairclf.runs.held_out import CommonRows, open_runs
from pairclf.runs.processes import WorkerError, run_processes
from pairclf.scores.figures import METRICS, check_metric, finite, judge
from pairclf.scores.intervals import Estimate, estimate
from pairclf.scores.significance import Decision, SeedNoise, decide, effect_noise, seed_noise
from pairclf.signals import ENDING

SEED = "seed"
SHARED = ("data.", "folds.", "task.", "output_dir.")
"""Settings that decide which rows are held out, and where: they can't be varied."""

_ENDED = {128 + number for number in ENDING}
"""Exit codes of a training that was asked to end, and not only to fail."""

SAME = 1e-12
"""Difference of two runs' figures that is rounding alone."""

LONGEST_NAME = 70
"""Characters of a run folder's name, before its settings are hashed."""

Train = Callable[[Sequence[str]], int]
"""Runs `pairclf` with these arguments, and returns its exit code."""


class SweepFile(Section):
    """The file of a sweep."""

    config: Path = Field(description="config file of the runs, relative to this file")
    axes: list[dict[str, list[Any]]] = Field(
        min_length=1, description="settings with their values; those of one entry go in step, entries are combined"
    )
    folds: list[int] = Field([0], min_length=1, description="folds to train")

    @model_validator(mode="after")
    def _in_step(self) -> SweepFile:
        for axis in self.axes:
            lengths = {key: len(values) for key, values in axis.items()}
            if len(set(lengths.values())) != 1 or 0 in lengths.values():
                raise ValueError(
                    f"an axis needs as many values of each of its settings, one at least; it has {lengths}"
                )
            steps = list(zip(*axis.values(), strict=True))
            if repeated_step := next((step for step in steps if steps.count(step) > 1), None):
                values = "+".join(str(value) for value in repeated_step)
                raise ValueError(f"{values} stands twice in {'+'.join(axis)}: a run would be compared with itself")
        keys = [key for axis in self.axes for key in axis]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands in two axes")
        varied = [key for axis in self.axes for key, values in axis.items() if len(values) > 1]
        if shared := [key for key in varied if f"{key}.".startswith(SHARED)]:
            raise ValueError(
                f"{shared[0]} can't be varied: it decides which rows are held out, and all runs need the same"
            )
        return self


@dataclass(frozen=True, slots=True)
class Arm:
    """A combination of values.

    Attributes:
        settings: `{key: value}`, of all axes.
        overrides: `key=value` for the command line.
        config: checked, with a run folder of its own.
    """

    settings: dict[str, Any]
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return output_of(self.config)

    def is_trained(self, folds: Sequence[int]) -> bool:
        """Whether all folds are finished with these settings."""
        records = [trained_as(Paths(self.folder, fold)) for fold in folds]
        return all(record and not trained_otherwise(self.config, record) for record in records)

    def hours(self, folds: Sequence[int]) -> float:
        """Hours of the training of these folds, as far as they are finished and noted."""
        records = [trained_as(Paths(self.folder, fold)).get(TRAINING) or {} for fold in folds]
        return sum(float(record.get("seconds", 0.0)) for record in records) / 3600


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that is about to run.

    Attributes:
        path: config file of the runs.
        axes: those with several values.
        arms: all combinations.
        folds: to train.
        folder: of all its runs.
    """

    path: Path
    axes: list[dict[str, list[Any]]]
    arms: list[Arm]
    folds: list[int]
    folder: Path


def plan_sweep(path: Path, entries: Sequence[str] = (), folds: Sequence[int] = ()) -> Sweep:
    """Read a config, or the file of a sweep, and check the settings of every combination.

    Args:
        path: a config with `entries`; or a sweep's file, to which they are added.
        entries: `key=value,value`; `key+key=value+value,value+value` for settings that go in step. One value is a
            setting of all runs.
        folds: to train; empty: as the file says, or fold 0.

    Raises:
        ConfigError: an entry or a combination can't be used, or nothing is varied.
    """
    tree = parse_yaml(_read(or_shipped(path)), path)
    axes = [_axis(entry) for entry in entries]
    if isinstance(tree, dict) and "axes" in tree:
        tree["axes"] = [*tree["axes"], *axes] if isinstance(tree["axes"], list) else tree["axes"]
        file = checked(SweepFile, tree, path, "docs/compare.md shows a sweep's file")
        config_path = Path(os.path.relpath(path.parent / file.config))
    else:
        if not axes:
            raise ConfigError(
                f"nothing is varied of {path}", remedy="e.g. pairclf sweep CONFIG model.lora.r=8,16 seed=0,1"
            )
        file = checked(SweepFile, {"config": str(path), "axes": axes}, path, "docs/compare.md shows the forms")
        config_path = path
    varied = [axis for axis in file.axes if len(next(iter(axis.values()))) > 1]
    if not varied:
        raise ConfigError("every setting has one value", remedy="give several, with commas between: seed=0,1")
    fixed = [_override(key, axis[key][0]) for axis in file.axes if axis not in varied for key in axis]
    folder = output_of(load_config(config_path, fixed)) / "sweep"
    chosen = list(folds) or file.folds
    arms = _arms(config_path, file.axes, folder)
    for arm in arms:
        check_metric("task.metric", arm.config.task.metric, arm.config.task)
        check_training(arm.config, chosen)
    return Sweep(config_path, varied, arms, chosen, folder)


def _read(path: Path) -> str:
    try:
        return read_plain(path, MAX_YAML)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}", remedy="give a config, or a sweep's file") from error


def _axis(entry: str) -> dict[str, list[Any]]:
    """`a=1,2` -> `{a: [1, 2]}`; `a+b=1+x,2+y` -> `{a: [1, 2], b: [x, y]}`; lists in brackets are one value.

    >>> _axis("model.lora.r+model.lora.lora_alpha=8+16,16+32")
    {'model.lora.r': [8, 16], 'model.lora.lora_alpha': [16, 32]}
    """
    names, _, text = entry.partition("=")
    keys, where = names.split("+"), f"entry {quoted(entry)}"
    values = parse_yaml(f"[{text}]", where)
    if len(keys) == 1:
        return {names: values}
    parts = [str(value).split("+") for value in values]
    if any(len(part) != len(keys) for part in parts):
        raise ConfigError(f"{where} needs {len(keys)} values in each place", remedy=f"{names}=1+2,3+4")
    return {key: [parse_yaml(part[place], where) for part in parts] for place, key in enumerate(keys)}


def _arms(path: Path, axes: Sequence[dict[str, list[Any]]], folder: Path) -> list[Arm]:
    """All combinations; each has a folder that is named by its settings, but for those that are `SHARED`."""
    named = [key for axis in axes for key in axis if not f"{key}.".startswith(SHARED)]
    levels = [[dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)] for axis in axes]
    combined = [{key: value for part in parts for key, value in part.items()} for parts in product(*levels)]
    names = [variant_name(settings, named) for settings in combined]
    arms = []
    for settings, name in zip(combined, names, strict=True):
        if (
            names.count(name) > 1 or len(name) > LONGEST_NAME
        ):  # values without letters and digits, or a name that was cut
            text = json.dumps({key: settings[key] for key in named}, sort_keys=True)
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        overrides = [_override(key, value) for key, value in {**settings, "output_dir": str(folder / name)}.items()]
        config = load_config(path, overrides)
        if config.data.cache_dir is None:  # one token cache for all
            overrides.append(_override("data.cache_dir", str(folder / "tokens")))
            config = load_config(path, overrides)
        arms.append(Arm(settings, tuple(overrides), config))
    return arms


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


# --- training --------------------------------------------------------------------------------------------------------


def train_arms(
    sweep: Sweep,
    *,
    hours: float | None = None,
    processes: int = 1,
    options: Sequence[str] = (),
    train: Train | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Arm]:
    """Train the runs that are not finished, each in a process of its own.

    Args:
        sweep: from `plan_sweep`.
        hours: no run is started that would end later, by the longest so far; a language model's training whose fit
            check expects more than the hours that are left for its fold ends before its first step. None: no limit.
        processes: of each training.
        options: of the command line, for each training.
        train: how a run is trained; None: by `pairclf cv`.
        clock: seconds.

    Returns:
        The runs that are finished.
    """
    train = train or (lambda arguments: run_processes(processes, arguments, to_stderr=True))
    hours_of = [arm.hours(sweep.folds) for arm in sweep.arms if arm.is_trained(sweep.folds)]
    start, longest = clock(), max(hours_of, default=0.0)
    for place, arm in enumerate(sweep.arms, start=1):
        if arm.is_trained(sweep.folds):
            console.print(f"{arm.folder.name} is finished")
            continue
        spent = (clock() - start) / 3600
        if hours is not None and spent + longest > hours:
            console.print(
                f"{spent:.1f} of {hours:g} hours are spent, and a run takes {longest:.1f}: "
                f"{counted(sum(not one.is_trained(sweep.folds) for one in sweep.arms), 'run')} not started; the same "
                "command continues"
            )
            break
        console.rule(f"{arm.folder.name} ({place} of {len(sweep.arms)})", align="left")
        _share_folds(sweep, arm)
        began = clock()
        settings = [*arm.overrides, f"folds.run=[{', '.join(map(str, sweep.folds))}]"]
        if hours is not None and arm.config.trains:
            settings.append(f"train.max_hours={(hours - spent) / len(sweep.folds):.4f}")
        try:
            code = train(["cv", str(sweep.path), *settings, *options, "--resume"])
        except WorkerError as error:
            if error.exit_code in _ENDED:
                raise
            console.print(f"{arm.folder.name} failed, and the next one is tried: {error}")
            continue
        if code in _ENDED:
            raise KeyboardInterrupt
        longest = max(longest, (clock() - began) / 3600)
    return [arm for arm in sweep.arms if arm.is_trained(sweep.folds)]


def _share_folds(sweep: Sweep, arm: Arm) -> None:
    """Give a run the folds of the sweep, which the first run makes: a seed alone would make others."""
    if not (sweep.folder / FOLDS).exists():
        Run(sweep.arms[0].config.model_copy(update={"output_dir": sweep.folder})).folds  # noqa: B018 - written
    copy_folds(sweep.folder, arm.folder)


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """A value on an axis.

    Attributes:
        values: of the axis's settings.
        figure: the mean over its runs.
        to_best: less that of the best value, paired; more is worse.
        decision: whether it is really worse; None: it is the best.
        runs: with this value and others that all values of the axis have been combined with.
    """

    values: dict[str, Any]
    figure: float
    to_best: Estimate
    decision: Decision | None
    runs: int


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What an axis does: its values, the best first.

    Attributes:
        keys: its settings.
        levels: the best first.
        remark: what lies beyond the grid and may be better, or why nothing is known, in words; empty: nothing.
        noise: of a run that is no effect of the axis; None: unknown, and left out.
    """

    keys: tuple[str, ...]
    levels: list[Level]
    remark: str
    noise: SeedNoise | None


@dataclass(frozen=True, slots=True)
class Departure:
    """Settings that left a sweep early: in the worse half, and really worse than the best.

    Attributes:
        settings: of all axes but the seed.
        folds: on whose rows they were judged.
        to_best: their mean figure less that of the best settings, paired; more is worse.
        threshold: the smallest difference that counts as real.
    """

    settings: dict[str, Any]
    folds: list[int]
    to_best: float
    threshold: float


@dataclass(frozen=True, slots=True, eq=False)
class SweepResult(Tables):
    """The effects of a sweep's settings.

    Attributes:
        metric: name of the figure.
        rows: held-out rows.
        arms: `(settings, figure)` of all finished runs.
        total: number of combinations.
        effects: of each axis but the seed.
        noise: between seeds; None: the sweep has no two.
        left: who left early, by `--halving`.
    """

    metric: str
    rows: int
    arms: list[tuple[dict[str, Any], float]]
    total: int
    effects: list[Effect]
    noise: SeedNoise | None
    left: Sequence[Departure] = ()

    def tables(self) -> list[Table]:
        return render(self)

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them."""
        return {
            "metric": self.metric,
            "rows": self.rows,
            "finished": len(self.arms),
            "runs": self.total,
            "arms": [{"settings": settings, "figure": figure} for settings, figure in self.arms],
            "seed_noise": None if self.noise is None else asdict(self.noise),
            "left": [asdict(departure) for departure in self.left],
            "effects": [
                {
                    "settings": effect.keys,
                    "remark": effect.remark,
                    "noise": None if effect.noise is None else asdict(effect.noise),
                    "values": [
                        {
                            "values": level.values,
                            "figure": level.figure,
                            "to_best": level.to_best.value,
                            "low": finite(level.to_best.low),
                            "high": finite(level.to_best.high),
                            "is_worse": None if level.decision is None else level.decision.is_real,
                            "runs": level.runs,
                        }
                        for level in effect.levels
                    ],
                }
                for effect in self.effects
            ],
        }


def effects_of(sweep: Sweep, arms: Sequence[Arm], left: Sequence[Departure] = ()) -> SweepResult:
    """The effect of each axis over the finished runs, on the same held-out rows.

    Args:
        sweep: from `plan_sweep`.
        arms: that are finished.
        left: who left early.

    Raises:
        ConfigError: fewer than two runs are finished, and none left.
    """
    if len(arms) < (1 if left else 2):
        raise ConfigError(
            f"{counted(len(arms), 'run')} of the sweep finished", remedy="start it again, with more --hours"
        )
    common, by_arm = figures_of_arms(arms, sweep.folds)
    metric = common.task.metric
    noise = seed_noise([[by_arm[place] for place in group] for group in alike(arms, [SEED])])
    sign = -METRICS[metric].better
    result = SweepResult(
        metric=metric,
        rows=len(common.ids),
        arms=[(arm.settings, figure.value) for arm, figure in zip(arms, by_arm, strict=True)],
        total=len(sweep.arms),
        effects=[
            _effect(tuple(axis), arms, by_arm, sign, noise, len(common.ids)) for axis in sweep.axes if [*axis] != [SEED]
        ],
        noise=noise,
        left=left,
    )
    write_json(sweep.folder / "sweep.json", result.as_dict())
    return result


def figures_of_arms(arms: Sequence[Arm], folds: Sequence[int]) -> tuple[CommonRows, list[Estimate]]:
    """The held-out rows of these folds, and the task's metric of each run, with draws that all share."""
    common = open_runs([arm.folder for arm in arms], folds=folds)
    record = METRICS[common.task.metric]
    figures = estimate(
        {
            str(place): record.statistic(judge(run.probabilities, common.targets, common.task, common.weights))
            for place, run in enumerate(common.runs)
        },
        common.groups,
        common.weights,
    )
    return common, [figures[str(place)] for place in range(len(arms))]


def alike(arms: Sequence[Arm], but: Sequence[str]) -> list[list[int]]:
    """Places of runs that have all settings in common but these."""
    groups: dict[str, list[int]] = {}
    for place, arm in enumerate(arms):
        others = {key: value for key, value in arm.settings.items() if key not in but}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(place)
    return list(groups.values())


def _effect(
    keys: tuple[str, ...], arms: Sequence[Arm], figures: Sequence[Estimate], sign: int, noise: SeedNoise | None, n: int
) -> Effect:
    """Each value of an axis against the best one, over the runs that differ by this axis alone.

    Args:
        keys: settings of the axis.
        arms: finished runs.
        figures: of each run, with draws that all share.
        sign: 1 if lower is better, else -1.
        noise: between seeds, for an axis whose values have one run each; otherwise that of the axis itself counts.
        n: number of rows.
    """
    runs: dict[str, dict[str, Estimate]] = {}
    for arm, figure in zip(arms, figures, strict=True):
        others = {key: value for key, value in arm.settings.items() if key not in keys}
        own = json.dumps([arm.settings[key] for key in keys])
        runs.setdefault(own, {})[json.dumps(others, sort_keys=True)] = figure
    shared = sorted(set.intersection(*({*own} for own in runs.values())))
    if not shared:
        return Effect(keys, [], "no two runs differ by this axis alone", None)
    means = {name: mean_figure([own[place] for place in shared]) for name, own in runs.items()}
    order = sorted(means, key=lambda name: sign * means[name].value)
    noise = effect_noise([[runs[name][place] for place in shared] for name in order]) or noise
    levels = []
    for name in order:
        gap = minus(means[name], means[order[0]], sign)
        decision = None if name == order[0] else decide(gap, n, noise=noise, compared=len(order), seeds=len(shared))
        values = dict(zip(keys, json.loads(name), strict=True))
        levels.append(Level(values, means[name].value, gap, decision, len(shared)))
    return Effect(keys, levels, "; ".join(_edges(keys, levels)), noise)


def mean_figure(figures: Sequence[Estimate]) -> Estimate:
    """The mean of figures that share their draws."""
    return Estimate(float(np.mean([one.value for one in figures])), np.mean([one.draws for one in figures], axis=0))


def _edges(keys: Sequence[str], levels: Sequence[Level]) -> Iterator[str]:
    """Settings whose best value is the largest or the smallest, and really better than another."""
    if not any(level.decision is not None and level.decision.is_real for level in levels):
        return
    for key in keys:
        values = [level.values[key] for level in levels]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            best, way = values[0], "above" if values[0] == max(values) else "below"
            if best in (min(values), max(values)) and min(values) < max(values):
                yield f"the best {key}={best} is at the edge of the grid: try values {way}"


def render(result: SweepResult) -> list[Table]:
    """A table for each axis."""
    tables = []
    for effect in result.effects:
        effect_table = table(
            f"{', '.join(effect.keys)}: {METRICS[result.metric].title} on {counted(result.rows, 'row')}",
            *("value", "runs", "mean", "vs best", "95%", "real from", "real?"),
        )
        for level in effect.levels:
            decision = level.decision
            effect_table.add_row(
                ", ".join(str(value) for value in level.values.values()),
                str(level.runs),
                number(level.figure),
                *(["", "", "", "best"] if decision is None else _cells(level, decision)),
            )
        effect_table.caption, effect_table.caption_justify = "\n".join(_remarks(effect, result)), "left"
        tables.append(effect_table)
    return tables


def _cells(level: Level, decision: Decision) -> list[str]:
    return [f"{level.to_best.value:+.4f}", half_width(level.to_best), number(decision.threshold), verdict(decision)]


def _remarks(effect: Effect, result: SweepResult) -> Iterator[str]:
    name = ", ".join(effect.keys)
    if not any(level.decision is not None and level.decision.is_real for level in effect.levels):
        yield f"the values of {name} are not distinguishable"
    if effect.remark:
        yield effect.remark
    if effect.noise is None:
        yield "noise of seeds: unknown, and left out; add seed=0,1 to have it counted"
    elif effect.noise.sampling < SAME:
        yield "noise of a run beyond its settings: none; the runs of each value are equal, and one is enough"
    else:
        degrees = counted(effect.noise.degrees, "degree")
        yield f"noise of a run beyond its settings: {effect.noise.deviation:.4f} ({degrees} of freedom)"
    if len(result.arms) < result.total:
        yield f"{len(result.arms)} of {result.total} runs are finished"
    for one in result.left:
        yield f"left after {counted(len(one.folds), 'fold')}: {one.settings} ({one.to_best:+.4f})"
