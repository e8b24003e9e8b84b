"""Check that a merged or exported bundle scores like its sources: on held-out rows, as read back from disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.bundles.bundle import Bundle
from pairclf.bundles.inputs import builder_of
from pairclf.config import Config
from pairclf.console import counted, table
from pairclf.data.identity import prompt_marks, refuse_other_rows, seen_by
from pairclf.data.rows import to_rows
from pairclf.data.scores import class_matrix, read_scores
from pairclf.errors import BundleError, DataError
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import pick_device
from pairclf.model.device_memory import free_memory
from pairclf.model.inputs import encoded_rows
from pairclf.model.scoring import by_order, items_of, score
from pairclf.model.weights import load_classifier
from pairclf.run import OOF, labelled_rows
from pairclf.scores.figures import measure, title, titled
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import mean_of_models, mean_of_orders
from pairclf.task import Row, Task


@dataclass(frozen=True, slots=True)
class ScoreDrift:
    """How merging or exporting changed the scores of the same rows.

    Attributes:
        num_bundles: number of merged bundles.
        rows: scored rows.
        reference: metrics of the source, or of the mean of several sources' probabilities.
        after: metrics of the new bundle.
        largest_change, mean_change: change of a probability, absolute.
        out_of_fold: metrics of the sources' out-of-fold scores of these rows, for information; see `render`.
        factor_error: norm of (mean of factors - mean of products) / norm of the mean of products; None where exact.
        in_sample: whether each row was in the training data of the source (of several: of all but one).
        operation: merged or exported.
    """

    num_bundles: int
    rows: int
    reference: dict[str, float]
    after: dict[str, float]
    largest_change: float
    mean_change: float
    out_of_fold: dict[str, float] | None
    factor_error: float | None
    in_sample: bool
    operation: Literal["merged", "exported"] = "merged"

    @property
    def change(self) -> float:
        """Log loss after - before; above 0 is worse."""
        return self.after["log_loss"] - self.reference["log_loss"]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics for the new bundle's manifest, prefixed, as they are not out-of-fold."""
        figures = {
            "rows": float(self.rows),
            **self.after,
            "reference": self.reference["log_loss"],
            "shift": self.change,
            "largest_change": self.largest_change,
            "mean_change": self.mean_change,
        }
        return {f"{self.operation}_{name}": value for name, value in figures.items()}


@dataclass(frozen=True, slots=True)
class HeldOutSample:
    """The rows to score, in both orders.

    Attributes:
        rows: labelled.
        items: of the rows, in both orders.
        out_of_fold: out-of-fold scores `(N, C)` of the sources; None: there are none.
        in_sample: whether each row was in the training data of a source.
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


def sample_rows(config: Config, bundles: Sequence[Bundle], rows: int | None) -> HeldOutSample:
    """The rows held out by the folds of a run's bundles (for a bundle of all rows: all), or a sample of `rows` of them.

    Raises:
        DataError: a bundle's out-of-fold scores are missing, belong to another bundle, or are of unknown rows.
    """
    frame, scores = labelled_rows(config), None
    folds = [bundle for bundle in bundles if bundle.manifest.fold is not None]
    chosen = frame
    if folds:
        scores = pl.concat([_out_of_fold(bundle, frame) for bundle in folds])
        chosen = frame.join(scores.select("id"), on="id", how="semi", maintain_order="left")
    return _make_sample(config, bundles[0], frame, chosen, rows, scores, in_sample=len(folds) != 1)


def sample_unseen_rows(config: Config, bundle: Bundle, rows: int | None) -> HeldOutSample:
    """Labelled rows without prompts (or near duplicates) that the bundle was trained on, or a sample of `rows` of them.

    All labelled rows, if there are none, or if the bundle does not record its training prompts.
    """
    frame = labelled_rows(config)
    seen = seen_by(
        prompt_marks(frame, config.task), [bundle.trained_on()], [bundle.config.folds.near_duplicate_threshold]
    )[0]
    unseen = frame.filter(~seen.fill_null(value=True))
    return _make_sample(
        config, bundle, frame, frame if unseen.is_empty() else unseen, rows, in_sample=unseen.is_empty()
    )


def _make_sample(
    config: Config,
    bundle: Bundle,
    frame: pl.DataFrame,
    chosen: pl.DataFrame,
    rows: int | None,
    scores_of_rows: pl.DataFrame | None = None,
    *,
    in_sample: bool,
) -> HeldOutSample:
    """Sample `rows` of the `chosen` rows, encode them, and attach their out-of-fold scores."""
    encoded = encoded_rows(config, builder_of(bundle), frame)
    if rows is not None and rows < len(chosen):
        indices = np.random.default_rng(config.seed).choice(len(chosen), rows, replace=False)
        chosen = chosen[np.sort(indices).tolist()]
    scores = None if scores_of_rows is None else _aligned_scores(chosen, scores_of_rows, config)
    items = items_of(encoded.of(chosen["id"]), orders=2)
    return HeldOutSample(to_rows(chosen, config.task), items, scores, in_sample, config.predict.tokens_per_batch)


def _aligned_scores(frame: pl.DataFrame, scores: pl.DataFrame, config: Config) -> Floats:
    """The scores `(N, C)` of the frame's rows, in their order."""
    joined = frame.select("id").join(scores, on="id", how="left", maintain_order="left", validate="1:1")
    return class_matrix(joined, config.task)


def _out_of_fold(bundle: Bundle, labelled: pl.DataFrame) -> pl.DataFrame:
    """The out-of-fold scores beside a fold's bundle, after checking that they give the manifest's log loss."""
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
    saved_loss = bundle.manifest.metrics.get("log_loss", float("nan"))
    if not abs(loss - saved_loss) <= 1e-6:
        raise DataError(
            f"out-of-fold scores give log loss {loss:.6f}, but the manifest says {saved_loss:.6f}: they are from "
            "different trainings, or labels or weights have changed",
            where=path,
            remedy="merge with the data that the fold was trained with, or train the fold again",
        )
    return scores


def logits_of(bundle: Bundle, items: Sequence[list[Item]], base: Path | None) -> list[Floats]:
    """Logits `(M, C)` of each list of items, by the bundle as read from disk."""
    classifier, budget = load_classifier(bundle, pick_device(), base), bundle.config.predict.tokens_per_batch
    scored = [score(classifier, batch, tokens_per_batch=budget, title=bundle.name) for batch in items]
    del classifier
    free_memory()
    return scored


def sample_probabilities(bundle: Bundle, sample: HeldOutSample, logits: Floats) -> Floats:
    """`(M, C)` logits of a sample's items -> `(N, C)` probabilities of its held-out rows."""
    task, orders = bundle.config.task, by_order(sample.items, logits, len(sample.rows))
    return mean_of_orders(orders, task, bundle.config.predict.temperature)


def reference(bundles: Sequence[Bundle], sample: HeldOutSample, base: Path | None) -> Floats:
    """The probabilities `(N, C)` with which the new bundle's are compared.

    One fold: its out-of-fold scores. Several: the mean of the sources' probabilities on the same rows. Each row is in
    the training data of all sources but one, so that a comparison with out-of-fold scores would be unfair.
    """
    if len(bundles) == 1 and sample.out_of_fold is not None:
        return sample.out_of_fold
    scored = [sample_probabilities(bundle, sample, logits_of(bundle, [sample.items], base)[0]) for bundle in bundles]
    return mean_of_models(scored)


def compare(
    sample: HeldOutSample,
    before: Floats,
    after: Floats,
    task: Task,
    *,
    num_bundles: int,
    operation: Literal["merged", "exported"],
    factor_error: float | None = None,
) -> ScoreDrift:
    """Compare probabilities `(N, C)` before and after."""
    targets, weights, change = sample.targets, sample.weights, np.abs(after - before)
    out_of_fold = sample.out_of_fold
    return ScoreDrift(
        num_bundles=num_bundles,
        rows=len(targets),
        reference=measure(before, targets, task, weights),
        after=measure(after, targets, task, weights),
        largest_change=float(change.max()),
        mean_change=float(change.mean()),
        out_of_fold=None if out_of_fold is None else measure(out_of_fold, targets, task, weights),
        factor_error=factor_error,
        in_sample=sample.in_sample,
        operation=operation,
    )


def render(drift: ScoreDrift, task: Task) -> Table:
    """The figures as a table, with caveats below it."""
    of = "bundle" if drift.num_bundles == 1 else "ensemble"
    bundles, rows = counted(drift.num_bundles, "bundle"), counted(drift.rows, "row")
    report = table(f"{bundles} {drift.operation}, on {rows}", "", of, drift.operation, "change")
    for name, after in drift.after.items():
        before = drift.reference[name]
        report.add_row(title(name, task), f"{before:.5f}", f"{after:.5f}", f"{after - before:+.5f}")
    report.add_row("largest change of a probability", "", "", f"{drift.largest_change:.5f}")
    report.add_row("mean change of a probability", "", "", f"{drift.mean_change:.5f}")
    report.caption, report.caption_justify = "\n".join(_notes(drift, task)), "left"
    return report


def _notes(drift: ScoreDrift, task: Task) -> list[str]:
    notes = []
    if drift.num_bundles > 1:
        notes.append(
            f"In sample: each row is in the training data of all but one of the {drift.num_bundles} bundles, so new "
            "rows will score worse."
        )
        if drift.out_of_fold is not None:
            figures = ", ".join(f"{name} {value:.5f}" for name, value in titled(drift.out_of_fold, task).items())
            notes.append(f"Out of fold, the single bundles had {figures} on these rows.")
    elif drift.in_sample:
        notes.append("In sample: the bundle was trained on these rows; only the change is meaningful.")
    if drift.factor_error is not None:
        notes.append(
            f"The product of the mean factors differs from the mean of the products BA by {drift.factor_error:.0%}."
        )
    return notes


def require_within(drift: ScoreDrift, max_shift: float, out: Path) -> None:
    """Raise if the log loss moved by more than `max_shift`.

    One bundle, merged or exported, must compute the same function: a change in either direction counts. A mean of
    weights differs from the ensemble by design: it may be better, and only a higher log loss counts.

    Raises:
        BundleError: the log loss moved too far.
    """
    several = drift.num_bundles > 1
    move, upwards = (drift.change, " upwards") if several else (abs(drift.change), "")
    if not move <= max_shift:
        remedy = f"predict with what was to be {drift.operation}, or raise --max-shift if that is what it may cost"
        before, after = (figures["log_loss"] for figures in (drift.reference, drift.after))
        raise BundleError(
            f"being {drift.operation} moved the log loss by {drift.change:+.5f}, from {before:.5f} to {after:.5f} on "
            f"{counted(drift.rows, 'row')}; --max-shift allows {max_shift:g}{upwards}. Nothing was written to {out}",
            remedy=f"--average exact keeps more of the parts; or {remedy}"
            if drift.factor_error is not None
            else remedy,
        )
