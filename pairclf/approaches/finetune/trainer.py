"""A run's rows, tokenised, and a training on each fold of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from accelerate import Accelerator

from pairclf.approaches.finetune.checkpoints import CHECKPOINTS, discard, identity_of
from pairclf.approaches.finetune.step import Examples, HeldOut, make_examples
from pairclf.approaches.finetune.train import train
from pairclf.approaches.protocol import LABEL_MASS
from pairclf.approaches.torch_models import FittedClassifier, open_run
from pairclf.data.identity import fingerprint
from pairclf.data.rows import targets_of, to_rows
from pairclf.data.teachers import teachers_of
from pairclf.model.vocabulary import label_mass
from pairclf.run import Run, Split


class FinetuneTrainer:
    """A run's rows, tokenised once for all folds."""

    def __init__(self, run: Run, accelerator: Accelerator) -> None:
        self.config, self._tokenizer, self._encoded = open_run(run, visible=accelerator.is_main_process)
        self._accelerator = accelerator
        self._examples: tuple[Split, Examples, HeldOut | None] | None = None

    def identity(self, split: Split) -> dict[str, Any]:
        return identity_of(self.config, *self._laid_out(split))

    def fit(
        self, split: Split, folder: Path, *, resume: bool | None, trust_checkpoint: bool
    ) -> FittedClassifier | None:
        examples, held_out = self._laid_out(split)
        trained = train(
            self.config,
            examples,
            folder,
            self._accelerator,
            held_out=held_out,
            resume=resume,
            trust_checkpoint=trust_checkpoint,
        )
        self._examples = None
        if not self._accelerator.is_main_process:
            return None
        if (mass := label_mass(self.config, trained.classifier, examples.encoded)) is not None:
            trained.record[LABEL_MASS] = mass
        return FittedClassifier(*trained, self.config, self._tokenizer, self._encoded)

    def finish(self, folder: Path) -> None:
        discard(folder / CHECKPOINTS)  # the bundle holds what they were kept for

    def _laid_out(self, split: Split) -> tuple[Examples, HeldOut | None]:
        if self._examples is None or self._examples[0] is not split:
            training, held_out = split
            rows, encoded = to_rows(training, self.config.task), self._encoded.of(training["id"])
            examples = make_examples(rows, encoded, self.config, teachers_of(self.config, training))
            self._examples = split, examples, None if held_out is None else self._held_out(held_out)
        return self._examples[1:]

    def _held_out(self, held_out: pl.DataFrame) -> HeldOut:
        rows, weights = to_rows(held_out, self.config.task), held_out["weight"].to_numpy()
        return HeldOut(self._encoded.of(held_out["id"]), targets_of(held_out), weights, fingerprint(rows))
