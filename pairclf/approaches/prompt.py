"""The approach `prompt`: a base that is asked for a label word, with examples before each row or none, untrained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pairclf.approaches.language_model import FittedClassifier, LanguageModelApproach, open_run
from pairclf.approaches.protocol import CALIBRATION_GAIN, LABEL_MASS, Process, only_process
from pairclf.bundles.bundle import Saved
from pairclf.bundles.contents import CONFIG, BundleFiles
from pairclf.bundles.examples import write_examples
from pairclf.config import SECTIONS, Config, dump_config
from pairclf.console import console, counted
from pairclf.data.rows import targets_of
from pairclf.files import write_text
from pairclf.inputs.cache import EncodedRows
from pairclf.inputs.examples import pick_examples, with_examples
from pairclf.model.backbone import pick_device
from pairclf.model.engine import Classifier, build_untrained
from pairclf.model.readout import LabelTokenHead
from pairclf.model.scoring import by_order, items_of, score
from pairclf.model.vocabulary import label_mass, sampled_rows
from pairclf.run import Run, Split, identity_of_rows
from pairclf.scores.metrics import Floats, measure
from pairclf.scores.probabilities import mean_of_orders, probabilities
from pairclf.task import Row


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
        if config.prompt.calibration == "batch":
            others = others[sampled_rows(config, len(others))]
            record[CALIBRATION_GAIN] = calibrate(config, classifier, encoded.of(others["id"]), targets_of(others))
        record["seconds"] = time.perf_counter() - start
        return FittedPrompt(classifier, record, config, self._tokenizer, encoded, examples)

    def finish(self, folder: Path) -> None:
        """Nothing was kept: no training was interrupted."""


def calibrate(config: Config, classifier: Classifier, encoded: EncodedRows, targets: Floats) -> float:
    """Let the head divide each class's probability by its mean over these rows and their orders.

    That mean is what the examples, the wording and the label words favour whatever the row is; both orders have one, so
    that a row and its mirror get the same two sets of logits (Zhou et al. 2023, arXiv 2309.17249).

    Args:
        config: how rows are scored.
        classifier: its head is that of label tokens.
        encoded: rows that are no examples.
        targets: `(N, C)`; they decide nothing but the figure.

    Returns:
        By how much the rows' log loss fell.
    """
    head, task = classifier.head, config.task
    assert isinstance(head, LabelTokenHead)
    items = items_of(encoded, orders=2)
    logits = score(classifier, items, tokens_per_batch=config.predict.tokens_per_batch, title="calibrate")
    prior = np.log(probabilities(logits, task).mean(axis=0))
    with torch.no_grad():
        head.prior.copy_(torch.from_numpy(prior))
    before, after = (
        measure(mean_of_orders(by_order(items, shifted, len(encoded)), task, config.predict.temperature), targets, task)
        for shifted in (logits, logits - prior)
    )
    gain = before["log_loss"] - after["log_loss"]
    console.print(
        f"batch calibration: log loss {before['log_loss']:.4f} before, {after['log_loss']:.4f} after, on "
        f"{counted(len(encoded), 'training row')} whose labels it did not see"
    )
    return gain


class PromptApproach(LanguageModelApproach):
    """A base that says the label, without training."""

    sections = frozenset(SECTIONS["prompt"])
    module = __name__

    def check(self, config: Config) -> None:
        """Everything is checked when the base's tokenizer is there."""

    def start(self, config: Config) -> Process:
        return only_process(config)

    def trainer(self, run: Run, process: Process) -> PromptTrainer:
        return PromptTrainer(run)
