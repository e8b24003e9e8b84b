"""Labels among all tokens: the loss over the whole vocabulary, and how much of its probability the labels hold."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from pairclf.bundles.base import resolve_base
from pairclf.config import Config
from pairclf.console import console
from pairclf.inputs.labels import LOW_MASS
from pairclf.inputs.render import Encoded
from pairclf.model.engine import Classifier
from pairclf.model.lm_head import LmHead, lm_head_of
from pairclf.model.readout import LabelTokenHead, over_vocabulary
from pairclf.model.scoring import items_of, score

ROWS = 200
"""Rows that an untrained or trained model is measured on."""


def vocabulary_loss(config: Config, classifier: Classifier) -> AbstractContextManager[None]:
    """Within, the labels' logits are log-probabilities over the vocabulary, if `train.loss` wants them so."""
    if config.train.loss != "vocabulary" or not isinstance(classifier.head, LabelTokenHead):
        return nullcontext()
    return over_vocabulary(classifier.head, _lm_head(config, classifier, "train.loss=vocabulary"))


def label_mass(config: Config, classifier: Classifier, encoded: Sequence[tuple[Encoded, ...]]) -> float | None:
    """The mean probability that some label is the next token, over up to `ROWS` of these rows, drawn by seed.

    Where a row may have several labels, that yes or no is the next token, over the labels too.

    Args:
        config: its base has the LM head.
        classifier: in evaluation mode or not; it is left as it is.
        encoded: rows; they are read in the order of the file.

    Returns:
        The label mass; None: the classifier's logits are not those of tokens.
    """
    if not isinstance(classifier.head, LabelTokenHead):
        return None
    items = items_of([encoded[row] for row in sampled_rows(config, len(encoded))], orders=1)
    with over_vocabulary(classifier.head, _lm_head(config, classifier, "the label mass"), mass=True):
        logits = score(classifier, items, tokens_per_batch=config.predict.tokens_per_batch, title="label mass")
    mass = float(np.exp(logits).mean())
    console.print(f"label mass {mass:.3f}: the labels' share of all tokens' probability, on {len(items):,} rows")
    if mass < LOW_MASS:
        console.print(
            f"warning: the label mass is {mass:.3f}, below {LOW_MASS}: the model would continue the text otherwise; "
            "look at the end of inputs.template.text and at model.label_words (`pairclf show` prints the text)"
        )
    return mass


def sampled_rows(config: Config, count: int) -> list[int]:
    """Up to `ROWS` of so many rows, drawn by seed, in their order."""
    return sorted(np.random.default_rng(config.seed).permutation(count)[:ROWS].tolist())


def _lm_head(config: Config, classifier: Classifier, setting: str) -> LmHead:
    return lm_head_of(resolve_base(config.model.base), classifier.backbone, setting)
