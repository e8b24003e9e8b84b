"""Compare runs on the same rows: figures, paired differences to the best, whether they are real, and what runs cost."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.approaches.protocol import MEMORY_GB
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.config import deciding_settings
from pairclf.console import Tables, console, counted, number, progress, table
from pairclf.errors import ConfigError, DataError, PairclfError
from pairclf.files import atomic_file, write_json
from pairclf.inference.forecast import total_seconds
from pairclf.run import SCORED_ROWS, SCORED_SECONDS, TRAINING, Paths, output_of, training_log
from pairclf.runs.evaluation_report import write_figures
from pairclf.runs.held_out import CommonRows, ScoredRun
from pairclf.scores.figures import METRICS, estimates_as_json, finite, judge, metrics_of, values_of
from pairclf.scores.intervals import Estimate, Statistic, estimate, mean_of
from pairclf.scores.metrics import row_losses
from pairclf.scores.significance import Decision, SeedNoise, decide, pareto_front, seed_noise
from pairclf.task import hidden_rows_of

DEVICE = "t4x2"
COLUMNS = {"log_loss": "log loss", "accuracy": "accuracy", "macro_f1": "F1", "calibration_error_debiased": "cal. RMSE"}
"""Figures that are shown beside the metric that runs are compared by, with their titles."""

COSTS = {"hours": "forecast hours", "total_weights": "weights", "training_hours": "training hours"}
"""What the Pareto front is drawn against: the first of these that is known of all runs."""


@dataclass(frozen=True, slots=True)
class RunCost:
    """What a run costs; None: not known.

    Attributes:
        trained_weights: numbers that training changed.
        total_weights: numbers of the whole model, its base included.
        training_hours: of all folds.
        training_rows_per_second: rows seen by the optimizer.
        rows_per_second: held-out rows scored in all orders, on the machine of the training.
        peak_memory: of the training on its device, in bytes.
        hours: of the prediction of the hidden test by all bundles on `DEVICE`.
        why_not: why `hours` is not known.
    """

    trained_weights: int | None = None
    total_weights: int | None = None
    training_hours: float | None = None
    training_rows_per_second: float | None = None
    rows_per_second: float | None = None
    peak_memory: float | None = None
    hours: float | None = None
    why_not: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ComparedRun:
    """A run beside the others.

    Attributes:
        name: of the run.
        figures: by names of `METRICS`, and `flip_rate` where both orders are known; those that are not shown have a
            value without draws.
        to_best: its figure less that of the best, paired, signed so that more is worse.
        decision: whether it is really worse than the best; None: it is the best.
        cost: what it costs.
        on_front: whether no other run is better and cheaper; None: the costs are not known.
        seeds: names of the runs that differ from it by their seed alone.
    """

    name: str
    figures: Mapping[str, Estimate]
    to_best: Estimate
    decision: Decision | None
    cost: RunCost
    on_front: bool | None
    seeds: tuple[str, ...]

    @property
    def equals_best(self) -> bool:
        """Whether it has the best run's figure on all draws of rows, as a copy of it has."""
        return len(self.to_best.draws) > 0 and self.to_best.value == 0 and not self.to_best.draws.any()


@dataclass(frozen=True, slots=True, eq=False)
class Comparison(Tables):
    """Runs on the same rows, the best first.

    Attributes:
        metric: name of the figure that they are compared by.
        rows: number of rows.
        prompts: number of groups of rows with one prompt.
        runs: the best first.
        noise: between seeds; None: no two runs differ by their seed alone.
        public_rows: rows of the leaderboard that the noise is given for.
        cost: key of `COSTS` that the Pareto front is drawn against; None: there is none.
    """

    metric: str
    rows: int
    prompts: int
    runs: list[ComparedRun]
    noise: SeedNoise | None
    public_rows: int
    cost: str | None

    @property
    def rivals(self) -> list[ComparedRun]:
        """The runs that are no other seed of the best one."""
        return [run for run in self.runs[1:] if run.name not in self.runs[0].seeds]

    @property
    def winner(self) -> str | None:
        """The best run, if it is really better than each of its rivals."""
        is_best = self.rivals and all(run.decision is not None and run.decision.is_real for run in self.rivals)
        return self.runs[0].name if is_best else None

    def leaderboard_noise(self, figure: Estimate) -> float:
        """Standard deviation of a figure on a leaderboard of `public_rows` rows like these."""
        return deviation(figure) * math.sqrt(self.rows / self.public_rows)

    @property
    def rank_chances(self) -> dict[str, float]:
        """The chance that the leaderboard puts the best run above each other one, by both samples' noise."""
        chances = {}
        for run in self.runs[1:]:
            here, there = deviation(run.to_best), self.leaderboard_noise(run.to_best)
            if (noise := math.hypot(here, there)) > 0:
                chances[run.name] = 0.5 * math.erfc(-run.to_best.value / noise / math.sqrt(2))
        return chances

    def tables(self) -> list[Table]:
        return render(self)

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them."""
        limits = {name: figure.limits for name, figure in METRICS.items()}
        return {
            "metric": self.metric,
            "rows": self.rows,
            "prompts": self.prompts,
            "winner": self.winner,
            "seed_noise": None if self.noise is None else asdict(self.noise),
            "pareto_cost": self.cost,
            "leaderboard": {
                "rows": self.public_rows,
                "noise": finite(self.leaderboard_noise(self.runs[0].figures[self.metric])),
                "best_above": self.rank_chances,
            },
            "runs": [
                {
                    "name": run.name,
                    "figures": estimates_as_json(run.figures, limits),
                    "to_best": {
                        **estimates_as_json({"to_best": run.to_best}, {})["to_best"],
                        "p_better": finite(run.to_best.share_below_zero),
                        "leaderboard_noise": finite(self.leaderboard_noise(run.to_best)),
                    },
                    "decision": None
                    if run.decision is None
                    else {name: finite(value) for name, value in asdict(run.decision).items()},
                    "cost": asdict(run.cost),
                    "on_front": run.on_front,
                    "seeds": run.seeds,
                }
                for run in self.runs
            ],
        }


def compare_runs(common: CommonRows, *, public_rows: int | None = None, language_models: bool = False) -> Comparison:
    """Compare runs by the task's metric.

    Args:
        common: the runs on their common rows.
        public_rows: rows of the leaderboard; None: those of the competition's hidden test.
        language_models: whether to forecast their hours too, which loads torch and tokenises the test file.

    Raises:
        ConfigError: there is one run alone, or as `check_metric`.
    """
    if len(common.runs) < 2:
        raise ConfigError("one run can't be compared", remedy="give two or more; `pairclf evaluate` judges one")
    task, runs = common.task, common.runs
    metric = metrics_of(task)[0]
    sign = -METRICS[metric].better
    figures = _figures(common, list(dict.fromkeys([metric, *COLUMNS])))
    order = sorted(range(len(runs)), key=lambda place: sign * figures[place][metric].value)
    best = figures[order[0]][metric]
    groups = seed_groups(runs)
    noise = seed_noise([[figures[place][metric] for place in group] for group in groups])
    gaps = [minus(own[metric], best, sign) for own in figures]
    costs = _costs(common, language_models)
    cost = next((name for name in COSTS if all(getattr(own, name) is not None for own in costs)), None)
    fronts: list[bool] | list[None] = [None] * len(runs)
    if cost is not None:
        fronts = pareto_front(
            np.array(
                [[sign * own[metric].value, getattr(part, cost)] for own, part in zip(figures, costs, strict=True)]
            )
        )
    compared = [
        ComparedRun(
            name=runs[place].name,
            figures=figures[place],
            to_best=gaps[place],
            decision=None
            if place == order[0]
            else decide(gaps[place], len(common.ids), noise=noise, compared=len(runs)),
            cost=costs[place],
            on_front=fronts[place],
            seeds=tuple(runs[other].name for group in groups if place in group for other in group if other != place),
        )
        for place in order
    ]
    hidden = hidden_rows_of(task)
    return Comparison(
        metric, len(common.ids), len(np.unique(common.groups)), compared, noise, public_rows or hidden, cost
    )


def deviation(figure: Estimate) -> float:
    """Standard deviation of a figure over other rows; NaN without draws."""
    return float(np.nanstd(figure.draws)) if len(figure.draws) else math.nan


def minus(figure: Estimate, other: Estimate, sign: int = 1) -> Estimate:
    """`sign * (figure - other)` of two figures that share their draws."""
    return Estimate(sign * (figure.value - other.value), sign * (figure.draws - other.draws))


def seed_groups(runs: Sequence[ScoredRun]) -> list[list[int]]:
    """Places of runs that differ by their seed alone, at least two in a group."""
    alike: dict[str, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        if run.config is not None:
            settings = {key: value for key, value in deciding_settings(run.config).items() if key != "seed"}
            alike[json.dumps(settings, sort_keys=True)].append(place)
    return [group for group in alike.values() if len({_seed(runs[place]) for place in group}) > 1]


def _seed(run: ScoredRun) -> int | None:
    return None if run.config is None else run.config.seed


def _figures(common: CommonRows, names: Sequence[str]) -> list[dict[str, Estimate]]:
    """The figures of each run: those of these names, and flips, with draws that all runs share; the others without."""
    statistics: dict[str, Statistic] = {}
    values: list[dict[str, float]] = []
    for place, run in enumerate(common.runs):
        judged = judge(run.probabilities, common.targets, common.task, common.weights)
        values.append(values_of(judged))
        statistics |= {f"{place} {name}": METRICS[name].statistic(judged) for name in names}
        if run.flips is not None:
            statistics[f"{place} flip_rate"] = mean_of(run.flips.astype(np.float64))
    estimates = estimate(statistics, common.groups, common.weights)
    return [
        {name: Estimate(value, np.zeros(0)) for name, value in own.items()}
        | {name.partition(" ")[2]: found for name, found in estimates.items() if name.startswith(f"{place} ")}
        for place, own in enumerate(values)
    ]


# --- costs -----------------------------------------------------------------------------------------------------------


def _costs(common: CommonRows, language_models: bool) -> list[RunCost]:
    with progress("costs of runs", len(common.runs)) as advance:
        costs = []
        for run in common.runs:
            costs.append(_cost(run, language_models))
            advance(note=run.name)
    return costs


def _cost(run: ScoredRun, language_models: bool = False) -> RunCost:
    if run.config is None:
        return RunCost(why_not="a file of scores")
    if not run.bundles:
        return RunCost(why_not="no bundle")
    bundle = open_bundle(run.bundles[0], verified=True)
    trained, total = _weights(bundle)
    records = [record.get(TRAINING) or {} for record in run.trained.values()]
    seconds, steps, rows, scoring = (
        [float(record[name]) for record in records if name in record]
        for name in ("seconds", "steps", SCORED_ROWS, SCORED_SECONDS)
    )
    batch = run.config.train.global_batch_size
    hours, why_not = _forecast(run, bundle, language_models)
    return RunCost(
        trained_weights=trained,
        total_weights=total,
        training_hours=sum(seconds) / 3600 if len(seconds) == len(records) and records else None,
        training_rows_per_second=sum(steps) * batch / sum(seconds) if steps and sum(seconds) > 0 else None,
        rows_per_second=sum(rows) / sum(scoring) if sum(scoring) > 0 else None,
        peak_memory=_peak_memory(run),
        hours=hours,
        why_not=why_not,
    )


def _weights(bundle: Bundle) -> tuple[int, int | None]:
    """Numbers that training changed, and those of the whole model; None: its base is not on this machine."""
    own = sum(_numbers(path) for path in sorted(bundle.folder.rglob("*.safetensors")))
    own += sum(_numbers_of_trees(path) for path in sorted(bundle.folder.glob("lightgbm-*.txt")))
    kind = bundle.manifest.weights
    if kind in ("whole", "none"):
        return own, own
    try:
        base = sum(_numbers(path) for path in sorted(Path(bundle.weights_source()).glob("*.safetensors")))
    except PairclfError:
        base = 0
    return own if kind == "adapter" else 0, base + own if base else None


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, by its head."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


def _numbers_of_trees(path: Path) -> int:
    """How many thresholds and leaves boosted trees in LightGBM's text format have."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(len(line.split(" ")) for line in lines if line.startswith(("threshold=", "leaf_value=")))


def _peak_memory(run: ScoredRun) -> float | None:
    """The most memory that a fold's training noted, in bytes."""
    peaks = []
    for fold, record in run.trained.items():
        peaks.append((record.get(TRAINING) or {}).get(MEMORY_GB))
        try:
            lines = training_log(Paths(output_of(run.config), fold)) if run.config else []
        except DataError as error:  # the figures of the run stand without it
            console.print(f"note: {error.what}")
            lines = []
        peaks += [line.get(MEMORY_GB) for line in lines]
    return max((1e9 * peak for peak in peaks if isinstance(peak, int | float) and peak > 0), default=None)


def _forecast(run: ScoredRun, bundle: Bundle, language_models: bool) -> tuple[float | None, str]:
    """Hours to predict the hidden test, or why they are not known."""
    assert run.config is not None
    if bundle.manifest.weights != "none" and not language_models:
        return None, "a language model's forecast takes a while; --forecast makes it"
    data = run.config.data.test_file
    if data is None or not data.is_file():
        return None, "data.test names no file"
    rows = hidden_rows_of(run.config.task)
    try:
        return total_seconds(run.bundles, data, device=DEVICE, rows=rows) / 3600, ""
    except PairclfError as error:  # the figures of the run stand without it
        return None, error.what


# --- output ----------------------------------------------------------------------------------------------------------


def write_comparison(folder: Path, comparison: Comparison, common: CommonRows) -> None:
    """Write `compare.json`, the same as `figures.parquet`, and `losses.parquet` with the log loss of each row by each
    run, in a column `loss_RUN`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", comparison.as_dict())
    write_figures(folder / "figures.parquet", comparison.as_dict())
    losses = {
        f"loss_{run.name}": row_losses(run.probabilities, common.targets, multi_label=common.task.multi_label)
        for run in common.runs
    }
    columns = {"id": common.ids, "group": common.groups.tolist(), "weight": common.weights, **losses}
    with atomic_file(folder / "losses.parquet") as temporary:
        pl.DataFrame(columns).write_parquet(temporary)


def render(comparison: Comparison) -> list[Table]:
    """Three tables: figures, differences to the best, costs."""
    return [_figures_table(comparison), _differences_table(comparison), _costs_table(comparison)]


def _figures_table(comparison: Comparison) -> Table:
    metric = comparison.metric
    others = {name: short for name, short in COLUMNS.items() if name != metric}
    figures = table(
        f"{counted(len(comparison.runs), 'run')} on {counted(comparison.rows, 'row')} of "
        f"{counted(comparison.prompts, 'prompt')}",
        *("run", METRICS[metric].title, "95%", *others.values(), "flips"),
    )
    for run in comparison.runs:
        flips = run.figures.get("flip_rate")
        figures.add_row(
            run.name,
            number(run.figures[metric].value),
            half_width(run.figures[metric]),
            *(number(run.figures[name].value) for name in others),
            "-" if flips is None else f"{flips.value:.1%}",
            style="bold" if run.name == comparison.winner else None,
        )
    figures.caption, figures.caption_justify = (
        (
            "95%: half of the interval; F1: mean over the classes; cal. RMSE: calibration, 0 is best; "
            "flips: rows whose likeliest class changes with the order of the sides"
        ),
        "left",
    )
    return figures


def half_width(figure: Estimate) -> str:
    """Half the width of the interval, for a table; a hyphen without draws."""
    return "-" if math.isnan(figure.low) else f"±{(figure.high - figure.low) / 2:.4f}"


def _differences_table(comparison: Comparison) -> Table:
    best = comparison.runs[0]
    differences = table(
        f"Against {best.name}: {METRICS[comparison.metric].title}, more is worse",
        *("run", "difference", "95%", "P(better)", "real from", "real?"),
    )
    for run in comparison.runs[1:]:
        decision = run.decision
        assert decision is not None
        differences.add_row(
            run.name,
            f"{run.to_best.value:+.4f}",
            half_width(run.to_best),
            number(run.to_best.share_below_zero, 2),
            number(decision.threshold),
            "equal" if run.equals_best else "another seed" if best.name in run.seeds else verdict(decision),
        )
    differences.caption, differences.caption_justify = "\n".join(_remarks(comparison)), "left"
    return differences


def verdict(decision: Decision) -> str:
    """Whether a difference is real, and what would decide."""
    if decision.is_real:
        return "yes"
    ways = [counted(decision.rows_needed, "row")] if decision.rows_needed else []
    ways += [counted(decision.seeds_needed, "seed")] if decision.seeds_needed else []
    return f"no ({' or '.join(ways) or 'rows and seeds'})"


def _remarks(comparison: Comparison) -> list[str]:
    best, winner = comparison.runs[0], comparison.winner
    close = [run.name for run in comparison.rivals if run.decision is not None and not run.decision.is_real]
    if winner:
        remarks = [f"{winner} is better than all others"]
    elif close:
        remarks = [f"no winner: {best.name} is not distinguishable from {', '.join(close)}"]
    else:
        remarks = ["no winner: all runs are seeds of one config"]
    if alike := [run.name for run in comparison.runs[1:] if run.equals_best]:
        remarks.append(f"equal on all rows: {', '.join([best.name, *alike])}; one may be a copy of the other")
    remarks.append(f"P(better): the chance, over other rows, to be better than {best.name}")
    remarks.append(
        "real?: whether the difference exceeds `real from`, the noise, which grows with the number of runs; in "
        "brackets what would decide: rows in all, or seeds of each"
    )
    if comparison.noise is None:
        remarks.append(
            "seed noise: unknown, and left out; give a run that differs by its seed alone to have it counted"
        )
    else:
        remarks.append(
            f"seed noise: {comparison.noise.deviation:.4f} between seeds of one config "
            f"({counted(comparison.noise.degrees, 'degree')} of freedom), counted in `real from`"
        )
    one = comparison.leaderboard_noise(best.figures[comparison.metric])
    remarks.append(f"a leaderboard of {comparison.public_rows:,} rows is noisy by {one:.4f}")
    if comparison.rank_chances:
        chances = [f"{name} {chance:.0%}" for name, chance in comparison.rank_chances.items()]
        remarks[-1] += f"; chances that it puts {best.name} above: {', '.join(chances)}"
    return remarks


def _costs_table(comparison: Comparison) -> Table:
    costs = table("Costs", "run", "trained", "weights", "hours", "rows/s", "GB", f"{DEVICE} hours", "front")
    for run in comparison.runs:
        cost = run.cost
        costs.add_row(
            run.name,
            *(amount(value) for value in (cost.trained_weights, cost.total_weights)),
            number(cost.training_hours, 2),
            number(cost.rows_per_second, 1),
            number(None if cost.peak_memory is None else cost.peak_memory / 1e9, 1),
            number(cost.hours, 2),
            {None: "-", True: "yes", False: "no"}[run.on_front],
        )
    remarks = [
        "hours, GB: of the training of all folds; rows/s: held-out rows scored after it, in all orders; front: no "
        "other run is better and costs less"
    ]
    if comparison.cost is not None:
        remarks[0] += f" ({COSTS[comparison.cost]})"
    reasons: dict[str, list[str]] = defaultdict(list)
    for run in comparison.runs:
        if run.cost.why_not:
            reasons[run.cost.why_not].append(run.name)
    remarks += [f"no {DEVICE} hours of {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    costs.caption, costs.caption_justify = "\n".join(remarks), "left"
    return costs


def amount(value: int | None) -> str:
    """A number of weights in thousands, millions or billions.

    >>> amount(1_234), amount(9_240_000_000), amount(None)
    ('1.2k', '9.2B', '-')
    """
    if value is None:
        return "-"
    size = next((size for size in (1e9, 1e6, 1e3) if value >= size), 1.0)
    return f"{value:,}" if size == 1 else f"{value / size:.1f}{ {1e9: 'B', 1e6: 'M', 1e3: 'k'}[size] }"
