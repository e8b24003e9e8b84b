"""A run's rows for a base that is not trained: the examples of each fold, and the calibration of its label words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pairclf.approaches.protocol import CALIBRATION_GAIN, LABEL_MASS, MEMORY_GB
from pairclf.approaches.torch_models import FittedClassifier, open_run
from pairclf.bundles.bundle import Saved
from pairclf.bundles.contents import CONFIG, BundleFiles
from pairclf.bundles.examples import write_examples
from pairclf.config import Config, dump_config
from pairclf.console import console, counted
from pairclf.data.rows import targets_of
from pairclf.files import write_text
from pairclf.inputs.cache import EncodedRows
from pairclf.inputs.examples import pick_examples, with_examples
from pairclf.inputs.render import Encoded, InputBuilder
from pairclf.model.backbone import pick_device
from pairclf.model.device_memory import peak_memory
from pairclf.model.engine import Classifier, build_untrained
from pairclf.model.readout import LabelTokenHead
from pairclf.model.scoring import by_order, items_of, score
from pairclf.model.vocabulary import label_mass, sampled_rows
from pairclf.run import Run, Split, identity_of_rows
from pairclf.scores.figures import measure
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import mean_of_orders, probabilities
from pairclf.task import Row

LEAST = 1e-9
"""The least mean probability that a class is divided by: none becomes infinitely likely."""

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Texts that say nothing: those of Zhao et al. 2021, arXiv 2102.09690."""


class FittedPrompt(FittedClassifier):
    """A base as it is, and the examples that it is shown."""

    def __init__(
        self,
        classifier: Classifier,
        record: dict[str, float],
        config: Config,
        tokenizer: Any,
        encoded: EncodedRows,
        examples: Sequence[Row],
    ) -> None:
        super().__init__(classifier, record, config, tokenizer, encoded)
        self._examples = examples

    def save(self, folder: Path) -> Saved:
        if self._examples:
            write_examples(BundleFiles(folder).examples, self._examples)
        return super().save(folder)


class PromptTrainer:
    """A run's rows, tokenised once for all folds; a fold has examples of its own, of its training rows alone."""

    def __init__(self, run: Run) -> None:
        self.config, self._tokenizer, self._encoded = open_run(run)

    def identity(self, split: Split) -> dict[str, Any]:
        return identity_of_rows(self.config, split)

    def fit(self, split: Split, folder: Path, *, resume: bool | None, trust_checkpoint: bool) -> FittedPrompt:
        config, rows, start = self.config, split.training, time.perf_counter()
        write_text(folder / CONFIG, dump_config(config))
        examples = pick_examples(rows, config)
        encoded = self._encoded.built_by(with_examples(config, self._encoded.builder, examples))
        classifier = build_untrained(config, pick_device())
        to_all = examples if config.prompt.examples == "fixed" else []
        others = rows.filter(~pl.col("id").is_in([row.id for row in to_all]))
        others = others if len(others) else rows
        record = {}
        if (mass := label_mass(config, classifier, encoded.of(others["id"]))) is not None:
            record[LABEL_MASS] = mass
        if config.prompt.calibration != "none":
            others = others[sampled_rows(config, len(others))]
            rows_shown = measured = list(encoded.of(others["id"]))
            if config.prompt.calibration == "contextual":
                measured = without_content(config, self._encoded.builder, examples)
            record[CALIBRATION_GAIN] = calibrate(config, classifier, measured, rows_shown, targets_of(others))
        record |= {"seconds": time.perf_counter() - start, MEMORY_GB: peak_memory(classifier.device) / 1e9}
        return FittedPrompt(classifier, record, config, self._tokenizer, encoded, examples)

    def finish(self, folder: Path) -> None:
        """Nothing was kept: no training was interrupted."""


def without_content(config: Config, builder: InputBuilder, examples: Sequence[Row]) -> list[tuple[Encoded, ...]]:
    """Rows whose fields say nothing, behind the examples and, where the task can swap, behind their mirrors.

    Both sides of such a row are equal, and equal sides alone would have the examples as they are before both orders.
    """
    task = config.task
    rows = [Row(text, dict.fromkeys(task.fields, (text,))) for text in CONTENT_FREE]
    mirrors = [task.swap_row(row) for row in examples]
    shown = [examples, mirrors] if mirrors and task.swappable else [examples]
    return [orders for each in shown for orders in with_examples(config, builder, each).encode(rows)]


def calibrate(
    config: Config,
    classifier: Classifier,
    measured: Sequence[tuple[Encoded, ...]],
    others: Sequence[tuple[Encoded, ...]],
    targets: Floats,
) -> float:
    """Let the head divide each class's probability by its mean over the measured rows and their orders.

    That mean is what the examples, the wording and the label words favour whatever the row is; both orders have one, so
    that a row and its mirror get the same two sets of logits. Where a row may have several labels, yes and no of each
    are divided so.

    Args:
        config: how rows are scored.
        classifier: its head is that of label tokens.
        measured: rows that are no examples (Zhou et al. 2023, arXiv 2309.17249), or without content (Zhao et al. 2021,
            arXiv 2102.09690).
        others: rows that are no examples.
        targets: `(N, C)` of the others; they decide nothing but the figure.

    Returns:
        By how much the log loss of the others fell.
    """
    head, task, title = classifier.head, config.task, f"{config.prompt.calibration} calibration"
    assert isinstance(head, LabelTokenHead)

    def logits_of(encoded: Sequence[tuple[Encoded, ...]]) -> Floats:
        items = items_of(encoded, orders=2)
        scored = score(classifier, items, tokens_per_batch=config.predict.tokens_per_batch, title=title)
        return by_order(items, scored, len(encoded))

    logits = logits_of(others)
    mean = probabilities(logits if measured is others else logits_of(measured), task).mean(axis=(0, 1))
    mean = mean.clip(LEAST, 1 - LEAST)
    prior = np.log(mean / (1 - mean)) if task.multi_label else np.log(mean)
    with torch.no_grad():
        head.prior.copy_(torch.from_numpy(prior))
    before, after = (
        measure(mean_of_orders(shifted, task, config.predict.temperature), targets, task)["log_loss"]
        for shifted in (logits, logits - prior)
    )
    console.print(
        f"{title}: log loss {before:.4f} before, {after:.4f} after, on {counted(len(others), 'training row')} whose "
        "labels it did not see"
    )
    if after > before:
        console.print(f"warning: {title} made the log loss worse by {after - before:.4f}; set prompt.calibration=none")
    return before - after
