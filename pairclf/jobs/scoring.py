"""From rows to probabilities: encode, plan, run the classifier, undo the swap. Training validates with it,
`verify` re-scores its probes with it, and `predict` is built on it: there is no second way to a score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pairclf.console import progress
from pairclf.errors import BundleError, ModelError
from pairclf.inputs.plan import by_token_budget
from pairclf.inputs.render import Encoded
from pairclf.model.batch import Item
from pairclf.model.bundle import TOLERANCE, Bundle
from pairclf.model.engine import Classifier, layout_of
from pairclf.scores.blend import average_orders
from pairclf.task import AB, Row, Task

Floats = NDArray[np.float64]


def items_of(encoded: Sequence[tuple[Encoded, ...]], *, orders: int) -> list[Item]:
    """Every row in its first `orders` orders (fewer where the task can't swap)."""
    return [Item(row, order, one.ids) for row, shown in enumerate(encoded) for order, one in enumerate(shown[:orders])]


@torch.inference_mode()
def score(
    classifier: Classifier, items: Sequence[Item], *, tokens_per_batch: int, title: str = "score", visible: bool = True
) -> Floats:
    """Logits `(N, C)` of `items`, in their order, float64.

    A row's logits do not depend on which rows share its batch, beyond rounding.

    Raises:
        ModelError: a logit is not finite; names the rows' indices.
    """
    lay_out = layout_of("decoder", "head", "padded")
    was_training = classifier.training
    classifier.eval()
    lengths = [len(item.ids) for item in items]
    logits = np.full((len(items), classifier.head.out_features), np.nan)
    with progress(title, total=len(items), visible=visible) as advance:
        for members in by_token_budget(lengths, tokens_per_batch):
            batch = lay_out([items[index] for index in members]).to(classifier.device)
            logits[members] = classifier(batch.inputs, batch.read_at, batch.lengths).double().cpu().numpy()
            advance(len(members))
    classifier.train(was_training)
    bad = sorted({items[index].row for index in np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist()})
    if bad:
        raise ModelError(
            f"logits in {classifier.dtype} are not finite for {len(bad)} of {len({item.row for item in items})} rows",
            rows=[f"number {index}" for index in bad],
            remedy="set model.dtype=float32",
        )
    return logits


def by_order(items: Sequence[Item], logits: Floats, rows: int) -> list[Floats]:
    """Split logits `(N, C)` into one array `(rows, C)` an order, each indexed by row."""
    orders = sorted({item.order for item in items})
    split = [np.full((rows, logits.shape[1]), np.nan) for _ in orders]
    for item, values in zip(items, logits, strict=True):
        split[item.order][item.row] = values
    return split


def probabilities(logits: Sequence[Floats], task: Task, temperature: float = 1.0) -> list[Floats]:
    """Softmax (or sigmoid, for several labels at once) of each order's logits; still in each order's own columns."""
    scaled = [torch.from_numpy(one / temperature) for one in logits]
    return [(one.sigmoid() if task.multi_label else one.softmax(dim=-1)).numpy() for one in scaled]


def combine(orders: Sequence[Floats], task: Task) -> Floats:
    """One array `(N, C)` from each order's probabilities: order BA is un-swapped, then both are averaged."""
    return orders[AB] if len(orders) == 1 else average_orders(orders[0], orders[1], task)


def verify(bundle: Bundle, classifier: Classifier) -> float:
    """Score the bundle's probe rows again, from their texts, and return the largest difference of a logit.

    Raises:
        BundleError: it exceeds the tolerance of the dtype computed in.
    """
    probes = bundle.manifest.probes
    rows: list[Row] = [probe.row() for probe in probes]
    items = items_of(bundle.builder().encode(rows), orders=2)
    logits = score(classifier, items, tokens_per_batch=bundle.config.predict.tokens_per_batch, title="probes")
    saved = np.array([probes[item.row].logits[item.order] for item in items])
    difference = float(np.abs(saved - logits).max())
    here = str(classifier.dtype).removeprefix("torch.")
    allowed = max(TOLERANCE[here], TOLERANCE[bundle.manifest.dtype])
    if difference > allowed:
        raise BundleError(
            f"probe rows score differently here: a logit is off by {difference:.2g}; {here} allows {allowed:.2g}",
            where=bundle.folder,
            rows=[probe.id for probe in probes],
            remedy=f"use the versions that the bundle was made with: {bundle.manifest.versions}",
        )
    return difference
