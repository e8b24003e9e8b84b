"""Proof that a bundle made of others still scores as they did: on rows that were held out, as it stands on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Config
from pairclf.console import table
from pairclf.data.identity import prompt_marks, refuse_other_rows, seen_by
from pairclf.data.tables import class_matrix, read_scores, to_rows
from pairclf.errors import BundleError, DataError
from pairclf.jobs.fit import free_memory
from pairclf.jobs.inputs import encoded_rows
from pairclf.jobs.run import OOF, labelled_rows
from pairclf.jobs.scoring import Floats, by_order, items_of, score
from pairclf.model.backbone import pick_device
from pairclf.model.batch import Item
from pairclf.model.bundle import Bundle
from pairclf.scores.metrics import measure, title
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import Row, Task


@dataclass(frozen=True, slots=True)
class Shift:
    """What merging or exporting did to the scores of the same rows.

    Attributes:
        parts: bundles that were merged.
        rows: rows that were scored.
        reference: log loss of the bundle, or of the ensemble of the bundles: the mean of their probabilities.
        after: log loss of the new bundle.
        reference_accuracy, after_accuracy: their accuracies.
        largest, mean: change of a probability, absolute.
        out_of_fold: log loss of the bundles' out-of-fold scores of these rows; no reference, see `render`.
        drift: norm of (mean of factors - mean of products) / norm of the mean of products; None where exact.
        in_sample: the bundle, or all but one of several, was trained on each row.
        done: what was done to the parts.
    """

    parts: int
    rows: int
    reference: float
    after: float
    reference_accuracy: float
    after_accuracy: float
    largest: float
    mean: float
    out_of_fold: float | None
    drift: float | None
    in_sample: bool
    done: Literal["merged", "exported"] = "merged"

    @property
    def moved(self) -> float:
        """Log loss, after less before; above 0 it became worse."""
        return self.after - self.reference

    @property
    def metrics(self) -> dict[str, float]:
        """What the new bundle's manifest says. None of it is named `log_loss`: it is not out of fold."""
        figures = {
            "rows": float(self.rows),
            "log_loss": self.after,
            "reference": self.reference,
            "shift": self.moved,
            "accuracy": self.after_accuracy,
            "largest_change": self.largest,
            "mean_change": self.mean,
        }
        return {f"{self.done}_{name}": value for name, value in figures.items()}


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows to score, in both orders.

    Attributes:
        rows: labelled.
        items: of the rows, in both orders.
        out_of_fold: the scores `(N, C)` that the parts gave to the rows that they held out; None: they have none.
        in_sample: a part was trained on each row.
        tokens_per_batch: in a forward pass.
    """

    rows: Sequence[Row]
    items: list[Item]
    out_of_fold: Floats | None
    in_sample: bool
    tokens_per_batch: int | None

    @property
    def targets(self) -> Floats:
        return np.array([row.target for row in self.rows], dtype=np.float64)

    @property
    def weights(self) -> Floats:
        return np.array([row.weight for row in self.rows], dtype=np.float64)


def draw(config: Config, bundles: Sequence[Bundle], rows: int | None) -> Sample:
    """The rows that the folds of these bundles of a run held out (for a bundle of all rows, those), or `rows` of them.

    Raises:
        DataError: a bundle's out-of-fold scores are missing, are not its own, or are of rows that are not there.
    """
    frame, known = labelled_rows(config), None
    folds = [one for one in bundles if one.manifest.fold is not None]
    chosen = frame
    if folds:
        known = pl.concat([_out_of_fold(one, frame) for one in folds])
        chosen = frame.join(known.select("id"), on="id", how="semi", maintain_order="left")
    return _sample(config, bundles[0], frame, chosen, rows, known, in_sample=len(folds) != 1)


def draw_unseen(config: Config, bundle: Bundle, rows: int | None) -> Sample:
    """The labelled rows whose prompts, or nearly the same, a bundle was not trained on, or `rows` of them.

    All labelled rows, if there are none such, or nobody knows.
    """
    frame = labelled_rows(config)
    seen = seen_by(prompt_marks(frame, config.task), [bundle.trained_on()], [bundle.config.folds.near])[0]
    unseen = frame.filter(~seen.fill_null(value=True))
    return _sample(config, bundle, frame, frame if unseen.is_empty() else unseen, rows, in_sample=unseen.is_empty())


def _sample(
    config: Config,
    bundle: Bundle,
    frame: pl.DataFrame,
    chosen: pl.DataFrame,
    rows: int | None,
    known: pl.DataFrame | None = None,
    *,
    in_sample: bool,
) -> Sample:
    """`rows` of the `chosen` rows of all in `frame`, as the bundle encodes them, with the scores that are known."""
    encoded = encoded_rows(config, bundle.builder(), frame)
    if rows is not None and rows < len(chosen):
        drawn = np.random.default_rng(config.seed).choice(len(chosen), rows, replace=False)
        chosen = chosen[np.sort(drawn).tolist()]
    scores = None if known is None else _aligned(chosen, known, config)
    items = items_of(encoded.of(chosen["id"]), orders=2)
    return Sample(to_rows(chosen, config.task), items, scores, in_sample, config.predict.tokens_per_batch)


def _aligned(frame: pl.DataFrame, scores: pl.DataFrame, config: Config) -> Floats:
    """The scores `(N, C)` of the frame's rows, in their order."""
    joined = frame.select("id").join(scores, on="id", how="left", maintain_order="left", validate="1:1")
    return class_matrix(joined, config.task)


def _out_of_fold(bundle: Bundle, labelled: pl.DataFrame) -> pl.DataFrame:
    """The scores that stand beside a fold's bundle, if they give the log loss that its manifest says."""
    path, task = bundle.folder.parent / OOF, bundle.config.task
    scores = read_scores(path, task)
    refuse_other_rows(scores, labelled, task, path)
    joined = scores.join(labelled.select("id", "target", "weight"), on="id", how="left", maintain_order="left")
    if unknown := joined.filter(pl.col("target").is_null())["id"].to_list():
        raise DataError(
            "rows that the fold held out are not among the labelled rows",
            where=path,
            rows=unknown,
            remedy="merge with the data and the rules that the fold was trained with",
        )
    loss = measure(class_matrix(joined, task), joined["target"].to_list(), task, joined["weight"])["log_loss"]
    said = bundle.manifest.metrics.get("log_loss", float("nan"))
    if not abs(loss - said) <= 1e-6:
        raise DataError(
            f"out-of-fold scores give log loss {loss:.6f}, and their bundle says {said:.6f}: they are not of one "
            "training, or labels or weights changed since",
            where=path,
            remedy="merge with the data that the fold was trained with, or train the fold again",
        )
    return scores


def logits_of(bundle: Bundle, items: Sequence[list[Item]], base: Path | None) -> list[Floats]:
    """Logits `(M, C)` of each list of items by the bundle as it is read from disk."""
    classifier, budget = bundle.load(pick_device(), base), bundle.config.predict.tokens_per_batch
    scored = [score(classifier, one, tokens_per_batch=budget, title=bundle.name) for one in items]
    del classifier
    free_memory()
    return scored


def probabilities_of(bundle: Bundle, sample: Sample, logits: Floats) -> Floats:
    """`(M, C)` logits of items -> `(N, C)` probabilities of rows, as `fit` makes them for its out-of-fold scores."""
    task, orders = bundle.config.task, by_order(sample.items, logits, len(sample.rows))
    return mean_of_orders(orders, task, bundle.config.predict.temperature)


def reference(bundles: Sequence[Bundle], sample: Sample, base: Path | None) -> Floats:
    """What the new bundle's probabilities `(N, C)` are compared with.

    One fold: its out-of-fold scores. Else the mean of the parts' probabilities on these same rows: of each row, all
    parts but one were trained on it, and so was the mean of their weights; out-of-fold scores would flatter it.
    """
    if len(bundles) == 1 and sample.out_of_fold is not None:
        return sample.out_of_fold
    scored = [probabilities_of(one, sample, logits_of(one, [sample.items], base)[0]) for one in bundles]
    mean: Floats = np.mean(scored, axis=0)
    return mean


def compare(
    sample: Sample,
    before: Floats,
    after: Floats,
    task: Task,
    *,
    parts: int,
    done: Literal["merged", "exported"],
    drift: float | None = None,
) -> Shift:
    """Measure probabilities `(N, C)` before and after."""
    targets, weights, change = sample.targets, sample.weights, np.abs(after - before)
    old, new = (measure(one, targets, task, weights) for one in (before, after))
    known = sample.out_of_fold
    return Shift(
        parts=parts,
        rows=len(targets),
        reference=old["log_loss"],
        after=new["log_loss"],
        reference_accuracy=old["accuracy"],
        after_accuracy=new["accuracy"],
        largest=float(change.max()),
        mean=float(change.mean()),
        out_of_fold=None if known is None else measure(known, targets, task, weights)["log_loss"],
        drift=drift,
        in_sample=sample.in_sample,
        done=done,
    )


def render(shift: Shift, task: Task) -> Table:
    """The figures as a table, with what they are not below it."""
    of = "bundle" if shift.parts == 1 else "ensemble"
    shown = table(f"{shift.parts} bundle(s) {shift.done}, on {shift.rows:,} rows", "", of, shift.done, "change")
    for name, before, after in (
        (title("log_loss", task), shift.reference, shift.after),
        (title("accuracy", task), shift.reference_accuracy, shift.after_accuracy),
    ):
        shown.add_row(name, f"{before:.5f}", f"{after:.5f}", f"{after - before:+.5f}")
    shown.add_row("largest change of a probability", "", "", f"{shift.largest:.5f}")
    shown.add_row("mean change of a probability", "", "", f"{shift.mean:.5f}")
    shown.caption, shown.caption_justify = "\n".join(_notes(shift)), "left"
    return shown


def _notes(shift: Shift) -> list[str]:
    notes = []
    if shift.parts > 1:
        notes.append(
            f"In sample: all but one of the {shift.parts} bundles were trained on each row, so neither log loss is "
            "what new rows will have."
        )
        if shift.out_of_fold is not None:
            notes.append(f"Out of fold, the single bundles had {shift.out_of_fold:.5f} on these rows.")
    elif shift.in_sample:
        notes.append("In sample: the bundle was trained on these rows; only the change says something.")
    if shift.drift is not None:
        notes.append(f"The means of A and of B make another update than the mean of BA: off by {shift.drift:.0%}.")
    return notes


def judge(shift: Shift, max_shift: float, out: Path) -> None:
    """Do nothing if the new bundle may stand for its parts.

    A merge into weights, or an export, is meant to be the same function, so that any move counts, one for the better
    too. A mean of weights is another function than the ensemble by its nature; it may be better, and is refused where
    it is worse.

    Raises:
        BundleError: the log loss moved by more than `max_shift`.
    """
    several = shift.parts > 1
    counted, upwards = (shift.moved, " upwards") if several else (abs(shift.moved), "")
    if not counted <= max_shift:
        remedy = f"predict with what was to be {shift.done}, or raise --max-shift if that is what it may cost"
        raise BundleError(
            f"being {shift.done} moved the log loss by {shift.moved:+.5f}, from {shift.reference:.5f} to "
            f"{shift.after:.5f} on {shift.rows:,} rows; --max-shift allows {max_shift:g}{upwards}. "
            f"Nothing was written to {out}",
            remedy=f"--average exact keeps more of the parts; or {remedy}" if shift.drift is not None else remedy,
        )
