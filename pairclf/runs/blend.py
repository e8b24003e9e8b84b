"""Blend runs: fit weights and calibrations to held-out scores, judge them on other folds, and write `ensemble.yaml`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.table import Table

from pairclf.bundles.bundle import open_bundle
from pairclf.console import Tables, console, counted, number, progress, table
from pairclf.data.scores import scores_frame, write_scores
from pairclf.errors import ConfigError, DataError, quoted
from pairclf.files import write_text
from pairclf.inference.ensemble import EnsembleFile, MemberFile, NestedFigures, calibration_keys, open_ensemble
from pairclf.runs.compare import half_width
from pairclf.runs.evaluation_report import describe
from pairclf.runs.held_out import CommonRows, ScoredRun
from pairclf.scores.blend import BLENDS, CALIBRATED, Blend, HeldOutRows, blends_of, cross_fit, gains
from pairclf.scores.calibration import at_bound
from pairclf.scores.figures import finite, measure, title
from pairclf.scores.intervals import Estimate, difference
from pairclf.scores.metrics import Floats, row_losses
from pairclf.scores.probabilities import Calibration
from pairclf.scores.significance import Decision, decide
from pairclf.task import Task

FOLDS = 5
"""Folds of prompt groups for the judging, where the rows are of one fold of the runs."""

HEADER = "# Written by `pairclf blend`."


@dataclass(frozen=True, slots=True, eq=False)
class JudgedBlend:
    """A way to blend, and what it is worth.

    Attributes:
        blend: fitted to all rows; this is what would be used.
        scores: `(N, C)`, each row's by the blend that was fitted to the rows of other folds; of the best single member
            its own.
        nested: metrics of `scores`.
        flattering: log loss of `blend` on the rows that it was fitted to.
        against_single: its nested log loss less the log loss of the best single member, paired.
    """

    blend: Blend
    scores: Floats
    nested: dict[str, float]
    flattering: float
    against_single: Estimate

    @property
    def optimism(self) -> float:
        """How much the figure on its own rows flatters, in nats a row."""
        return self.nested["log_loss"] - self.flattering


@dataclass(frozen=True, slots=True, eq=False)
class BlendReport(Tables):
    """All ways to blend, and the one that is written.

    Attributes:
        task: of the runs.
        runs: as they were given.
        rows: number of rows.
        folds: number of folds that they were judged on.
        judged: by the names of `blends_of(task)`.
        chosen: the name of the one to use.
        ordered: place of the run in `runs`, and its gain in nats over those before it, for members of the chosen blend.
        decision: whether the chosen blend is better than the best single member.
        notes: what else is to be known.
    """

    task: Task
    runs: list[str]
    rows: int
    folds: int
    judged: dict[str, JudgedBlend]
    chosen: str
    ordered: list[tuple[int, float]]
    decision: Decision
    notes: list[str]

    def tables(self) -> list[Table]:
        return render(self)

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them."""
        return {
            "rows": self.rows,
            "judged_on_folds": self.folds,
            "chosen": self.chosen,
            "is_better_than_single": self.decision.is_real and self.decision.value < 0,
            "gains": {self.runs[member]: gain for member, gain in self.ordered},
            "blends": {name: self._blend_as_dict(judged) for name, judged in self.judged.items()},
            "notes": self.notes,
        }

    def _blend_as_dict(self, judged: JudgedBlend) -> dict[str, Any]:
        gap = judged.against_single
        return {
            "weights": dict(zip(self.runs, judged.blend.weights.tolist(), strict=True)),
            **calibration_keys(judged.blend.calibration),
            "mean": judged.blend.mean,
            "nested": judged.nested,
            "flattering_log_loss": judged.flattering,
            "optimism": judged.optimism,
            "against_single": {"value": gap.value, "low": finite(gap.low), "high": finite(gap.high)},
        }


def blend_runs(common: CommonRows, *, method: str | None = None, scores: Path | None = None) -> BlendReport:
    """Fit every way of `blends_of(task)`, and judge each on folds that it was not fitted to.

    Args:
        common: the runs on their common rows.
        method: the name of the way to use; None: the one with the lowest nested log loss, and of `CALIBRATED` only if
            it is really better than all others.
        scores: parquet file for the chosen blend's nested scores.

    Raises:
        ConfigError: there is no such method.
        DataError: all rows have one prompt.
    """
    task, runs = common.task, common.runs
    if method is not None and method not in (known := blends_of(task)):
        raise ConfigError(f"--method {quoted(method)} is unknown", remedy=f"one of {'; '.join(known)}")
    rows = HeldOutRows(np.stack([run.probabilities for run in runs]), common.targets, common.weights, task)
    folds = judging_folds(common)
    judged = _judged(rows, folds, common.groups)
    best, remarks = _chosen(judged)
    chosen = method or best
    if scores is not None:
        _write_scores(scores, common, judged[chosen].scores)
    return BlendReport(
        task=task,
        runs=[run.name for run in runs],
        rows=len(common.ids),
        folds=len(np.unique(folds)),
        judged=judged,
        chosen=chosen,
        ordered=gains(judged[chosen].blend, rows),
        decision=decide(judged[chosen].against_single, len(common.ids), noise=None),
        notes=[*remarks, *_notes(common)],
    )


def _chosen(judged: Mapping[str, JudgedBlend]) -> tuple[str, list[str]]:
    """The name of the blend to write, and what more than a temperature is worth."""

    def loss(name: str) -> float:
        return judged[name].nested["log_loss"]

    plain = min((name for name in judged if name not in CALIBRATED), key=loss)
    worth, remarks = list[str](), list[str]()
    for name in filter(CALIBRATED.__contains__, judged):
        own, other = judged[name].against_single, judged[plain].against_single  # they share their draws
        gap, calibration = Estimate(own.value - other.value, own.draws - other.draws), judged[name].blend.calibration
        if is_worth_it(gap, calibration):
            worth.append(name)
        remarks.append(note_of_calibration(name, plain, gap, calibration))
    return min(worth, key=loss, default=plain), remarks


def is_worth_it(gap: Estimate, calibration: Calibration) -> bool:
    """Whether a calibration is really better than a simpler one: `gap`, its log loss less the other's, says so, and the
    fit is inside its range."""
    return gap.high < 0 and not at_bound(calibration)


def note_of_calibration(name: str, other: str, gap: Estimate, calibration: Calibration) -> str:
    """What a calibration is worth against a simpler one."""
    verdict = "better than" if is_worth_it(gap, calibration) else "no better than"
    if at_bound(calibration):
        verdict = "at the bound of its range, so not used in place of"
    return f"{name}: {verdict} {other} ({gap.value:+.4f} {half_width(gap)}); {describe(calibration)}"


def judging_folds(common: CommonRows) -> NDArray[np.int64]:
    """`(N,)`: the runs' own folds; or `FOLDS` folds of prompt groups, where there is one fold or none.

    Raises:
        DataError: all rows have one prompt.
    """
    if common.folds is not None and len(np.unique(common.folds)) > 1:
        return common.folds
    _, places = np.unique(common.groups, return_inverse=True)
    if (count := int(places.max()) + 1) < 2:
        raise DataError(
            f"{counted(len(common.ids), 'row')} of one prompt can't be judged: a blend is fitted to some prompts and "
            "judged on others",
            remedy="give runs with more rows",
        )
    dealt: NDArray[np.int64] = np.random.default_rng(0).permutation(count) % min(FOLDS, count)
    return dealt[places]


def _judged(rows: HeldOutRows, folds: NDArray[np.int64], groups: NDArray[np.str_]) -> dict[str, JudgedBlend]:
    task = rows.task
    fits, scores = {}, {}
    ways = blends_of(task)
    with progress("fitting blends", len(ways) * (len(np.unique(folds)) + 1)) as advance:
        for name, fit in ways.items():
            fits[name] = fit(rows)
            advance(note=name)
            scores[name] = cross_fit(fit, rows, folds, advance)
    # A member's scores are held out as they are. Were it chosen fold by fold, the fold would go to a member that is
    # good on the others and so, among equals, bad on this one: worse than each member, and an easy rival.
    single = next(iter(BLENDS))
    scores[single] = fits[single].of(rows.members, task)
    losses = {name: row_losses(values, rows.targets, multi_label=task.multi_label) for name, values in scores.items()}
    return {
        name: JudgedBlend(
            blend=fits[name],
            scores=values,
            nested=measure(values, rows.targets, task, rows.weights),
            flattering=measure(fits[name].of(rows.members, task), rows.targets, task, rows.weights, ["log_loss"])[
                "log_loss"
            ],
            against_single=difference(losses[name], losses[single], groups, rows.weights),
        )
        for name, values in scores.items()
    }


def _write_scores(path: Path, common: CommonRows, values: Floats) -> None:
    orders = 2 if all(run.flips is not None for run in common.runs) else 1
    names = [run.name for run in common.runs]
    write_scores(path, scores_frame(common.ids, values, common.task, orders, names, seen=0, hashes=common.hashes))


def _notes(common: CommonRows) -> Iterator[str]:
    """What a reader may overlook."""
    equal = [
        f"{run.name} and {other.name}"
        for place, run in enumerate(common.runs)
        for other in common.runs[:place]
        if np.abs(run.probabilities - other.probabilities).max() < 1e-6
    ]
    if equal:
        yield f"equal scores: {', '.join(equal)}; their weights could be shared out in any way"
    for run in common.runs:
        bundles = run.bundles
        if len(bundles) > 1 and all(open_bundle(path, verified=True).manifest.weights == "adapter" for path in bundles):
            yield (
                f"{run.name}: `pairclf merge` averages the adapters of its {len(bundles)} folds into one model, which "
                "takes a fraction of the time; it is no row here, as the folds have seen all rows together, and it has "
                "no held-out scores: judge it on other labelled rows (docs/compare.md)"
            )


# --- the ensemble's file ---------------------------------------------------------------------------------------------


def write_ensemble(out: Path, report: BlendReport, runs: Sequence[ScoredRun]) -> EnsembleFile:
    """Write the chosen blend as a file that `predict` and `package` take.

    A run's weight is shared by the bundles of its folds. The first bundle of each run comes first, with the gain that
    was measured; what the mean over the folds of a run brings is not known from out-of-fold scores.

    Raises:
        ConfigError: a member has no bundle, the bundles don't go together, or the file was not written by `blend`.
    """
    chosen = report.judged[report.chosen]
    check_target(out, [runs[member] for member, _ in report.ordered])
    rounds = max(len(runs[member].bundles) for member, _ in report.ordered)
    members = [
        (
            runs[member].bundles[turn],
            member_entry(
                out,
                runs[member],
                turn=turn,
                weight=float(chosen.blend.weights[member]) / len(runs[member].bundles),
                gain=gain if turn == 0 else None,
            ),
        )
        for turn in range(rounds)
        for member, gain in report.ordered
        if turn < len(runs[member].bundles)
    ]
    open_ensemble([bundle for bundle, _ in members], None, [])
    file = EnsembleFile(
        members=[entry for _, entry in members],
        **calibration_keys(chosen.blend.calibration),
        mean=chosen.blend.mean,
        out_of_fold={name: round(value, 6) for name, value in chosen.nested.items()},
        nested=_nested_figures(report),
    )
    names = ", ".join(runs[member].name for member, _ in report.ordered)
    comment = (
        f"{HEADER} {report.chosen} of {names};\n# out_of_fold: {counted(report.rows, 'row')}, each by weights fitted "
        "to other folds; the weights here are fitted to all of them.\n"
    )
    write_file(out, comment, file)
    return file


def _nested_figures(report: BlendReport) -> NestedFigures:
    chosen, single = report.judged[report.chosen], report.judged[next(iter(BLENDS))]
    gap = chosen.against_single
    return NestedFigures(
        method=report.chosen,
        rows=report.rows,
        raw=round(single.nested["log_loss"], 6),
        nested=round(chosen.nested["log_loss"], 6),
        flattering=round(chosen.flattering, 6),
        low=finite(-gap.high),
        high=finite(-gap.low),
    )


def check_target(out: Path, members: Sequence[ScoredRun]) -> None:
    """Whether an ensemble's file of these runs can be written.

    Raises:
        ConfigError: a run has no bundle, or the file was not written by `blend`.
    """
    if out.exists() and not out.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        raise ConfigError(f"{out} exists, and `pairclf blend` did not write it", remedy="give another --out")
    if without := [run.name for run in members if not run.bundles]:
        raise ConfigError(
            f"{', '.join(without)} has no bundle, so no ensemble can be predicted with",
            remedy="leave it out, or blend for the figures alone: --figures-only",
        )


def write_file(out: Path, comment: str, file: EnsembleFile) -> None:
    """Write an ensemble's file below a comment, which begins with `HEADER`."""
    write_text(out, comment + yaml.safe_dump(file.model_dump(mode="json", exclude_defaults=True), sort_keys=False))


def member_entry(out: Path, run: ScoredRun, *, turn: int, weight: float, gain: float | None) -> MemberFile:
    """The entry of one bundle of a run in the ensemble's file `out`."""
    bundles = run.bundles
    own = open_bundle(bundles[turn], verified=True).config.predict.temperature
    fitted_at = own if run.config is None else run.config.predict.temperature
    return MemberFile(
        bundle=Path(os.path.relpath(bundles[turn].resolve(), out.resolve().parent)),
        weight=weight,
        temperature=None if fitted_at == own else fitted_at,
        gain=None if gain is None else round(max(gain, 0.0), 6),
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def render(report: BlendReport) -> list[Table]:
    """The ways to blend with their figures, and the members of the one that is used."""
    metric = report.task.metric
    own = [] if metric == "log_loss" else [title(metric, report.task)]
    ways = table(
        f"Blends of {counted(len(report.runs), 'run')} on {counted(report.rows, 'row')}",
        "blend",
        *("log loss", *own, "own rows", "optimism", "vs single", "95%", "T"),
    )
    for name, judged in report.judged.items():
        gap = judged.against_single
        ways.add_row(
            name,
            number(judged.nested["log_loss"]),
            *([number(judged.nested[metric])] if own else []),
            number(judged.flattering),
            f"{judged.optimism:+.4f}",
            *(["", ""] if name == "best single" else [f"{gap.value:+.4f}", half_width(gap)]),
            number(given, 3) if isinstance(given := judged.blend.calibration.temperature, float) else "per label",
            style="bold" if name == report.chosen else None,
        )
    notes = [
        f"log loss: each row by weights fitted to the other of {report.folds} folds; own rows: by weights fitted "
        "to them, which flatters; optimism: log loss less own rows",
        "vs single: log loss less that of the best single run (below 0 is better), with half of its 95% interval; "
        "T: temperature of the mean",
        _verdict(report),
        *report.notes,
    ]
    ways.caption, ways.caption_justify = "\n".join(notes), "left"
    weights = report.judged[report.chosen].blend.weights
    members = table(f"Members: {report.chosen}", "run", "weight", "gain over those above")
    for member, gain in report.ordered:
        members.add_row(report.runs[member], number(float(weights[member]), 3), f"{gain:.4f}")
    left_out = [name for name, weight in zip(report.runs, weights, strict=True) if weight == 0]
    if left_out:
        members.caption, members.caption_justify = f"without {', '.join(left_out)}", "left"
    return [ways, members]


def _verdict(report: BlendReport) -> str:
    decision = report.decision
    if report.chosen == "best single":
        return "no blend is better than the best single run"
    if decision.is_real and decision.value < 0:
        return f"{report.chosen} is better than the best single run by {-decision.value:.4f} nats a row"
    if decision.is_real:
        return f"{report.chosen} is worse than the best single run by {decision.value:.4f} nats a row"
    return (
        f"{report.chosen} is not distinguishable from the best single run ({decision.value:+.4f} nats a row; "
        f"{decision.threshold:.4f} would be)"
    )


def note_written(out: Path, file: EnsembleFile) -> None:
    """Say what was written, and how it is used."""
    console.print(f"wrote {out} with {counted(len(file.members), 'bundle')}: pairclf predict {out} --data FILE")
