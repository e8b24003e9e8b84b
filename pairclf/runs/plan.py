"""Blend under a deadline: forecast what runs take, choose models, orders and cascades, and write `ensemble.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pairclf.console import console, counted, number, progress, table
from pairclf.errors import ConfigError
from pairclf.files import write_text
from pairclf.inference.deadline import format_duration
from pairclf.inference.ensemble import EnsembleFile, calibration_keys, open_ensemble
from pairclf.inference.forecast import SPARE, pass_seconds
from pairclf.page.html import document, printed
from pairclf.page.plots import Series, plot
from pairclf.runs.blend import (
    HEADER,
    check_target,
    is_worth_it,
    judging_folds,
    member_entry,
    note_of_calibration,
    write_file,
)
from pairclf.runs.held_out import CommonRows, ScoredRun
from pairclf.scores.blend import Blend, HeldOutRows
from pairclf.scores.calibration import METHODS, Method, methods_of
from pairclf.scores.figures import measure
from pairclf.scores.intervals import difference
from pairclf.scores.metrics import Floats, class_prior, row_losses
from pairclf.scores.plans import (
    FoundPlan,
    Plan,
    PlannableRows,
    Seconds,
    Use,
    best_within,
    fit_plan,
    nested_scores,
    probabilities_of,
    search,
)
from pairclf.task import hidden_rows_of

BEYOND = 2.0
"""The curve goes up to this many times the deadline: it shows what more time would bring."""

LOAD_SECONDS = 60.0
"""Of a run whose hours are given."""


@dataclass(frozen=True, slots=True, eq=False)
class JudgedPlan:
    """A plan of the curve.

    Attributes:
        found: the plan with its seconds, chosen on all rows.
        blend: weights and calibration, fitted to all rows.
        nested: metrics where plan and weights were chosen without a row's fold, within the same time.
        flattering: log loss of the plan and its blend on the rows that they were chosen on.
    """

    found: FoundPlan
    blend: Blend
    nested: dict[str, float]
    flattering: float

    @property
    def optimism(self) -> float:
        """How much the figure on its own rows flatters, in nats a row."""
        return self.nested["log_loss"] - self.flattering


@dataclass(frozen=True, slots=True, eq=False)
class PlanReport:
    """The curve of log loss over hours, and the plan for the deadline.

    Attributes:
        runs: as they were given.
        rows: held-out rows.
        hidden_rows: rows that the seconds are for.
        device: a profile.
        deadline: seconds.
        seconds: of each run.
        curve: from the quickest plan to the best.
        chosen: the place in the curve of the plan that is in time.
        gains: of each model of the chosen plan over those before it, in nats a row.
        notes: what else is to be known.
    """

    runs: list[str]
    rows: int
    hidden_rows: int
    device: str
    deadline: float
    seconds: list[Seconds]
    curve: list[JudgedPlan]
    chosen: int
    gains: list[float]
    notes: list[str]

    @property
    def plan(self) -> JudgedPlan:
        return self.curve[self.chosen]

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them."""
        return {
            "rows": self.rows,
            "hidden_rows": self.hidden_rows,
            "device": self.device,
            "deadline_hours": self.deadline / 3600,
            "spare": SPARE,
            "hours_of_runs": {
                name: {"load": cost.load / 3600, "first_order": cost.first / 3600, "second_order": cost.second / 3600}
                for name, cost in zip(self.runs, self.seconds, strict=True)
            },
            "chosen": self.chosen,
            "curve": [self._as_dict(judged) for judged in self.curve],
            "notes": self.notes,
        }

    def _as_dict(self, judged: JudgedPlan) -> dict[str, Any]:
        weights = judged.blend.weights.tolist()
        return {
            "hours": judged.found.seconds / 3600,
            "hours_with_spare": SPARE * judged.found.seconds / 3600,
            "members": [
                {"run": self.runs[use.member], "share": use.share, "swap_share": use.swap_share, "weight": weight}
                for use, weight in zip(judged.found.plan, weights, strict=True)
            ],
            **calibration_keys(judged.blend.calibration),
            "nested": judged.nested,
            "flattering_log_loss": judged.flattering,
            "optimism": judged.optimism,
        }


def hours_of(entries: Sequence[str], runs: Sequence[ScoredRun]) -> dict[str, Seconds]:
    """The seconds of runs from `NAME=HOURS` or `NAME=HOURS,HOURS` (second order after the first).

    Raises:
        ConfigError: there is no such run, it is named twice, or these are no numbers above 0.
    """
    given: dict[str, Seconds] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        if name not in {run.name for run in runs}:
            raise ConfigError(
                f"--hours {entry} names no run", remedy=f"NAME=HOURS, with one of {', '.join(run.name for run in runs)}"
            )
        if name in given:
            raise ConfigError(f"--hours names {name} twice", remedy=f"both orders at once: {name}=1.5,1.2")
        try:
            hours = [float(part) for part in text.split(",")]
        except ValueError:
            hours = []
        if not 1 <= len(hours) <= 2 or not all(np.isfinite(hours)) or min(hours) <= 0:
            raise ConfigError(
                f"--hours {entry} must be one or two numbers above 0",
                remedy=f"hours of the first order, and of the second: {name}=1.5,1.2",
            )
        given[name] = Seconds(LOAD_SECONDS, 3600 * hours[0], 3600 * hours[-1])
    return given


def plan_blend(
    common: CommonRows,
    *,
    deadline: float,
    device: str,
    hours: Sequence[str] = (),
    data: Path | None = None,
    hidden_rows: int | None = None,
) -> PlanReport:
    """Find the plans that no other beats in log loss and hours, and the best one that is in time.

    Args:
        common: the runs on their common rows.
        deadline: seconds; the plan's forecast leaves a part of it (`SPARE`), as machines get slower.
        device: a profile of `hardware.PROFILES`.
        hours: as in `hours_of`; other runs are forecast from their bundles.
        data: rows like the hidden ones, for the forecasts; None: `data.test` of each run.
        hidden_rows: number of rows of the hidden test; None: about those of the competition.

    Raises:
        ConfigError: nothing is known of a run's hours, or no plan is in time.
        DataError: all rows have one prompt.
    """
    folds, runs = judging_folds(common), common.runs
    count = hidden_rows or hidden_rows_of(common.task)
    given = hours_of(hours, runs)
    seconds = [given.get(run.name) or _forecast(run, data, device, count) for run in runs]
    rows = plannable(common, seconds)
    limit = deadline / SPARE
    longest = BEYOND * limit
    with progress("looking at plans", None) as advance:
        curve = search(rows, longest, advance)
        if (best := best_within(curve, limit)) is None:
            quickest = min(cost.load + cost.first for cost in seconds)
            raise ConfigError(
                f"--deadline of {format_duration(deadline)} leaves {format_duration(limit)} for scoring, and the "
                f"quickest run takes {format_duration(quickest)} for {counted(count, 'row')} on {device}",
                remedy="give a quicker run (pairclf distill, export), more time, or a faster --device",
            )
        limits = [limit if entry is best else entry.seconds for entry in curve]
        nested = nested_scores(rows, folds, limits, longest, methods_of(common.task), advance)
    place = curve.index(best)
    method, remarks = _calibration(common, best.plan, rows, {name: scores[place] for name, scores in nested.items()})
    judged = []
    for entry, scores in zip(curve, nested[method], strict=True):
        blend = fit_plan(entry.plan, rows, method)
        figures = measure(scores, common.targets, common.task, common.weights)
        judged.append(JudgedPlan(entry, blend, figures, rows.rows.loss(probabilities_of(entry.plan, rows, blend))))
    return PlanReport(
        runs=[run.name for run in runs],
        rows=len(common.ids),
        hidden_rows=count,
        device=device,
        deadline=deadline,
        seconds=seconds,
        curve=judged,
        chosen=place,
        gains=_gains(best.plan, rows, method),
        notes=[*remarks, *_notes(common, judged[place], limit)],
    )


def _calibration(
    common: CommonRows, plan: Plan, rows: PlannableRows, nested: Mapping[Method, Floats]
) -> tuple[Method, list[str]]:
    """The method of the plan's calibration, and what the others than a temperature are worth."""
    losses = {name: row_losses(of, common.targets, multi_label=common.task.multi_label) for name, of in nested.items()}
    chosen, remarks = METHODS[0], list[str]()
    for method in [*losses][1:]:
        gap = difference(losses[method], losses[METHODS[0]], common.groups, common.weights)
        calibration = fit_plan(plan, rows, method).calibration
        if is_worth_it(gap, calibration):
            chosen = method
        remarks.append(note_of_calibration(method, "a temperature", gap, calibration))
    return chosen, remarks


def plannable(common: CommonRows, seconds: Sequence[Seconds]) -> PlannableRows:
    """The runs' rows in one order and in both, with what a plan pays for each: `seconds` is a run's forecast."""
    both = np.stack([run.probabilities for run in common.runs])
    first = np.stack([run.probabilities if run.first_order is None else run.first_order for run in common.runs])
    two_orders = [run.first_order is not None for run in common.runs]
    # Scores that hold one order, or don't tell their orders apart, are predicted as they were made.
    costs = [
        cost if has_two or run.flips is not None else _of_known_orders(run, cost)
        for run, cost, has_two in zip(common.runs, seconds, two_orders, strict=True)
    ]
    return PlannableRows(HeldOutRows(both, common.targets, common.weights, common.task), first, two_orders, costs)


def _of_known_orders(run: ScoredRun, cost: Seconds) -> Seconds:
    """A run whose config predicts with one order takes the first alone; any other takes both."""
    one_order = run.config is not None and (run.config.predict.swap == "off" or run.config.orders == 1)
    return cost._replace(second=0.0) if one_order else cost


def _forecast(run: ScoredRun, data: Path | None, device: str, rows: int) -> Seconds:
    """Seconds of a run's first bundle. A language model's forecast loads torch."""
    if not run.bundles or run.config is None:
        raise ConfigError(
            f"{run.name} has no bundle, so its hours can't be forecast",
            remedy=f"give them: --hours {run.name}=1.5,1.2 (first order, second order)",
        )
    file = data or run.config.data.test_file
    if file is None or not file.is_file():
        raise ConfigError(
            f"data.test of {run.name} names no file, so its hours can't be forecast",
            remedy=f"give rows like the hidden ones: --data FILE; or --hours {run.name}=1.5,1.2",
        )
    return Seconds(*pass_seconds(run.bundles[0], file, device=device, rows=rows))


def _gains(plan: Plan, rows: PlannableRows, method: Method) -> list[float]:
    """What each model brings over those before it, in nats a row; the first one over the class prior."""
    prior = np.tile(class_prior(rows.rows.targets, rows.rows.weights), (len(rows.rows.targets), 1))
    losses = [rows.rows.loss(prior)]
    for models in range(1, len(plan) + 1):
        part = plan[:models]
        losses.append(rows.rows.loss(probabilities_of(part, rows, fit_plan(part, rows, method))))
    return [-step for step in np.diff(losses).tolist()]


def _notes(common: CommonRows, judged: JudgedPlan, limit: float) -> list[str]:
    notes = [f"hours are forecasts; the plan leaves {SPARE - 1:.0%} of its hours to spare, as machines get slower"]
    used = [common.runs[use.member] for use in judged.found.plan]
    if folded := [run.name for run in used if len(run.bundles) > 1]:
        notes.append(
            f"{', '.join(folded)}: the first bundle alone, as out-of-fold scores are of one model a row; the time that "
            f"is left ({format_duration(limit - judged.found.seconds)}) may go to the bundles of other folds"
        )
    for run in common.runs:
        if run.first_order is None and run.config is None and common.task.swappable:
            notes.append(f"{run.name}: a file of scores does not tell its orders apart, so they are not chosen")
    return notes


# --- output ----------------------------------------------------------------------------------------------------------


def write_planned(out: Path, report: PlanReport, runs: Sequence[ScoredRun]) -> EnsembleFile:
    """Write the chosen plan as a file that `predict` and `package` take.

    Raises:
        ConfigError: a member has no bundle, the bundles don't go together, or the file was not written by `blend`.
    """
    judged = report.plan
    check_target(out, [runs[use.member] for use in judged.found.plan])
    members = []
    for use, weight, gain in zip(judged.found.plan, judged.blend.weights, report.gains, strict=True):
        entry = member_entry(out, runs[use.member], turn=0, weight=float(weight), gain=gain)
        members.append(entry.model_copy(update={"share": use.share, "swap_share": use.swap_share}))
    open_ensemble([runs[use.member].bundles[0] for use in judged.found.plan], None, [])
    file = EnsembleFile(
        members=members,
        **calibration_keys(judged.blend.calibration),
        out_of_fold={name: round(value, 6) for name, value in judged.nested.items()},
    )
    comment = (
        f"{HEADER} For {format_duration(report.deadline)} on {report.device}: {counted(report.hidden_rows, 'row')} "
        f"take {format_duration(judged.found.seconds)};\n# out_of_fold: {counted(report.rows, 'row')}, each by a plan "
        "and weights that were chosen on other folds.\n"
    )
    write_file(out, comment, file)
    open_ensemble([out], None, [])  # what predict will read
    return file


def render(report: PlanReport) -> list[Table]:
    """The curve, and the members of the plan for the deadline."""
    curve = table(
        f"Log loss over hours: {counted(report.hidden_rows, 'row')} on {report.device}",
        *("takes", "members", "log loss", "own rows", "optimism"),
    )
    for place, judged in enumerate(report.curve):
        curve.add_row(
            format_duration(judged.found.seconds),
            ", ".join(_words(report.runs[use.member], use) for use in judged.found.plan),
            number(judged.nested["log_loss"]),
            number(judged.flattering),
            f"{judged.optimism:+.4f}",
            style="bold" if place == report.chosen else None,
        )
    captions = [
        f"bold: for the deadline of {format_duration(report.deadline)}; below it: what more time would bring",
        "log loss: each row by a plan and weights that were chosen on other folds within these hours",
        *report.notes,
    ]
    curve.caption, curve.caption_justify = "\n".join(captions), "left"
    members = table("Members", "run", "rows", "in both orders", "weight", "gain over those above", "takes")
    judged = report.plan
    for use, weight, gain in zip(judged.found.plan, judged.blend.weights, report.gains, strict=True):
        cost = report.seconds[use.member]
        takes = format_duration(cost.load + use.share * (cost.first + use.swap_share * cost.second))
        shares = f"{use.share:.0%}", f"{use.swap_share:.0%}"
        members.add_row(report.runs[use.member], *shares, number(float(weight), 3), f"{gain:.4f}", takes)
    return [curve, members]


def _words(name: str, use: Use) -> str:
    parts = [] if use.share == 1 else [f"{use.share:.0%} of rows"]
    parts += (
        ["one order"] if use.swap_share == 0 else [f"{use.swap_share:.0%} both orders"] if use.swap_share < 1 else []
    )
    return f"{name} ({', '.join(parts)})" if parts else name


def write_page(report: PlanReport, out: Path) -> None:
    """Write a page with the curve of log loss over hours; it needs no network."""
    hours = [judged.found.seconds / 3600 for judged in report.curve]
    texts = [", ".join(_words(report.runs[use.member], use) for use in judged.found.plan) for judged in report.curve]
    lines = {
        "nested": [judged.nested["log_loss"] for judged in report.curve],
        "own rows": [judged.flattering for judged in report.curve],
    }
    curve = plot(
        "Log loss over hours",
        [Series(name, hours, losses, texts, style="steps") for name, losses in lines.items()],
        x=f"hours on {report.device}",
        y="log loss",
        marks=[(report.deadline / SPARE / 3600, "deadline, with time to spare")],
    )
    write_text(out, document("Blend under a deadline", [curve, *map(printed, render(report))]))
    console.print(f"wrote {out}")
