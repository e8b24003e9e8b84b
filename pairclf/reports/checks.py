"""Checks of a run: one table, each with a code, what it looks at, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl

from pairclf.console import counted
from pairclf.inputs.labels import LOW_MASS
from pairclf.reports.contents import Contents
from pairclf.runs.truncation import MADE_EQUAL
from pairclf.scores.intervals import Estimate

MIN_BIAS = 0.02
"""The least bias for the side that stands first that is reported, a probability. With many rows a smaller one can be
more than chance, but it costs nothing."""


class CheckResult(NamedTuple):
    """What a check says: `found` something to act upon, `fine`, or `unknown`; and why."""

    state: Literal["found", "fine", "unknown"]
    text: str


@dataclass(frozen=True, slots=True)
class Check:
    """A record of `CHECKS`.

    Attributes:
        title: what would be wrong.
        look: whether it is.
        remedy: what to do then.
    """

    title: str
    look: Callable[[Contents], CheckResult]
    remedy: str


def interval(found: Estimate, digits: int = 4) -> str:
    """A figure with its interval, if there is one."""
    if math.isnan(found.low):
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _prior(contents: Contents) -> CheckResult:
    gain = contents.evaluation.gain
    text = f"gain over the class prior {interval(gain)} nats a row"
    if math.isnan(gain.low):
        return CheckResult("unknown" if gain.value > 0 else "found", f"{text}; one prompt has no interval")
    return CheckResult("fine" if gain.low > 0 else "found", text)


def _baseline(contents: Contents) -> CheckResult:
    baseline = contents.evaluation.baseline
    if contents.config.approach == "classical" and not contents.is_foreign:
        return CheckResult("unknown", "this run is classical itself")
    if baseline is None:
        return CheckResult("unknown", "no classical run in the same parent folder has scored these rows")
    text = f"gain over the classical baseline {interval(baseline.gain)} nats a row"
    return CheckResult("fine" if baseline.gain.low > 0 else "found", text)


def _folds(contents: Contents) -> CheckResult:
    folds = [part for part in contents.evaluation.slices if part.trait == "fold"]
    if not folds:
        return CheckResult("unknown", "fewer than two folds with 30 rows or more were scored")
    if outstanding := [part for part in folds if part.stands_out]:
        gaps = ", ".join(f"{part.name} by {interval(part.gap)}" for part in outstanding)
        return CheckResult("found", f"log loss less that of the other folds: {gaps}")
    return CheckResult("fine", f"the log losses of {counted(len(folds), 'fold')} differ by chance alone")


def _position(contents: Contents) -> CheckResult:
    orders = contents.evaluation.orders
    if orders is None:
        return CheckResult("unknown", "the scores of both orders are not known, or the task has no two sides")
    bias = orders.figures["first_position_bias"]
    is_found = bias.excludes_zero and abs(bias.value) >= MIN_BIAS
    return CheckResult("found" if is_found else "fine", f"surplus of the side that stands first: {interval(bias)}")


def _selection(contents: Contents) -> CheckResult:
    train = contents.config.train
    if contents.is_foreign:
        return CheckResult("unknown", "a file of scores does not say how its models were trained")
    choices = {"the weights": train.keep_weights == "best", "the end": train.early_stopping_patience is not None}
    chosen = [what for what, by_held_out_rows in choices.items() if by_held_out_rows]
    if contents.config.approach != "finetune" or not chosen:
        return CheckResult("fine", "nothing of the training was chosen by held-out rows")
    looks = max((sum(_is_look(line) for line in lines) for lines in contents.curves.values()), default=0)
    by = f"{train.metric_for_best_model} on held-out rows, in up to {counted(looks, 'evaluation')} a fold"
    return CheckResult("found", f"{' and '.join(chosen)} of the training were chosen by {by}")


def _is_look(line: object) -> bool:
    return isinstance(line, dict) and any(str(name).startswith("held_out_") for name in line)


def _mass(contents: Contents) -> CheckResult:
    if not contents.label_mass:
        return CheckResult("unknown", "the logits are not those of tokens, or the training did not note it")
    fold, mass = min(contents.label_mass.items(), key=lambda item: item[1])
    text = f"the labels hold {mass:.3f} of all tokens' probability in fold {fold}, the least of the folds"
    return CheckResult("found" if mass < LOW_MASS else "fine", text)


def _equal_sides(contents: Contents) -> CheckResult:
    by_row = contents.evaluation.by_row
    if MADE_EQUAL not in by_row.columns or contents.config.task.swap_fields is None:
        return CheckResult("unknown", "what truncation cut is not known, or the task has no two sides")
    equal = by_row.filter(MADE_EQUAL)["id"].to_list()
    text = f"{counted(len(equal), 'pair differs', 'pairs differ')} only in what truncation cut"
    return CheckResult("found" if equal else "fine", text + (f": {', '.join(equal[:3])}" if equal else ""))


def _sources(contents: Contents) -> CheckResult:
    rows = contents.evaluation.by_row.select("id", "group").join(contents.labelled.select("id", "file"), on="id")
    if rows["file"].n_unique() < 2:
        return CheckResult("fine", "all rows are of one file")
    shared = rows.group_by("group").agg(pl.len(), pl.col("file").n_unique()).filter(pl.col("file") > 1)
    text = f"{counted(len(shared), 'prompt')} in {counted(int(shared['len'].sum()), 'row')} stand in more than one file"
    return CheckResult("found" if len(shared) else "fine", text)


CHECKS: dict[str, Check] = {
    "R1": Check(
        "not better than the class prior",
        _prior,
        "Look at the worst rows and at the labels. Train longer, or with another learning rate; look at the learning "
        "curve. If a classical run is no better either, the texts may not hold the answer.",
    ),
    "R2": Check(
        "the classical baseline is not beaten",
        _baseline,
        "Submit the baseline, or blend both (pairclf blend). If there is none, train a classical run in the same "
        "parent folder: it takes minutes on a CPU (docs/approaches.md).",
    ),
    "R3": Check(
        "a fold stands out",
        _folds,
        "Look at its learning curve and its rows (filter by source). Folds of other rows are expected to differ where "
        "sources are few: set folds.group, or train the fold again with another seed to see whether it stays.",
    ),
    "R4": Check(
        "the side that stands first is favoured",
        _position,
        "Predict both orders (predict.swap=full), and train on both (train.swap=both or random).",
    ),
    "R5": Check(
        "selection by the held-out fold",
        _selection,
        "These figures are too good. Set max_steps from fold 0 with keep_weights=last, and compare the other folds; or "
        "evaluate on eval_rows rows and compare on the rest (docs/training.md).",
    ),
    "R6": Check(
        "the label mass is low",
        _mass,
        "The model would continue the text otherwise: look at the end of inputs.template.text and at "
        "model.label_words (pairclf show prints the text).",
    ),
    "R7": Check(
        "truncation makes sides equal",
        _equal_sides,
        "Nobody can tell these sides apart: raise inputs.max_length, or keep other tokens (inputs.truncation, "
        "inputs.head_ratio). pairclf lengths counts such rows for each length.",
    ),
    "R8": Check(
        "near duplicates across sources",
        _sources,
        "Folds keep them together, so the figures hold. If one file holds a copy of another, drop it or set "
        "exclude_overlap; look whether both give the same labels (pairclf suspects).",
    ),
}
"""The checks by code, in the order in which they are shown. A new check is a new record; docs/report.md lists them."""


def check(contents: Contents) -> dict[str, CheckResult]:
    """What each check says, by code."""
    return {code: record.look(contents) for code, record in CHECKS.items()}
