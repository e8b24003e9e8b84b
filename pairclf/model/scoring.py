"""Score sequences: compute their logits. Validation, `verify` and `predict` all use this module, so that scores agree
everywhere; `scores.probabilities` turns logits into probabilities."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairclf.console import counted, progress
from pairclf.errors import ModelError
from pairclf.inputs.plan import LAYOUTS, MAX_SHARING, by_token_budget, token_budget
from pairclf.inputs.render import Encoded
from pairclf.inputs.sequences import Item, common_starts
from pairclf.model.engine import Classifier
from pairclf.model.layouts import BATCH_LAYOUTS
from pairclf.scores.metrics import Floats

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def items_of(encoded: Sequence[tuple[Encoded, ...]], *, orders: int) -> list[Item]:
    """Every row in its first `orders` orders (fewer where the task can't swap)."""
    return [
        Item(row, order, sequence.ids)
        for row, orders_of_row in enumerate(encoded)
        for order, sequence in enumerate(orders_of_row[:orders])
    ]


class ClassifierScorer:
    """Computes logits, one forward pass a call; all logits outside of training come from here.

    Args:
        classifier: the model.
        layout: `predict.layout`. auto: `shared` where the backbone allows it, else `packed`, else `padded`. Which
            tokens are worth sharing is decided sequence by sequence in `layouts.shared`, by their number and not by a
            clock, so that a second run gives the same bits; where none are, it is `packed`.

    Attributes:
        layout: the layout used.
        trim: whether the last layer is computed only at the read tokens.
        why: reasons for both, for messages.

    Raises:
        ModelError: the layout is not legal for this model.
    """

    def __init__(self, classifier: Classifier, layout: str = "auto") -> None:
        refused = {name: classifier.why_not(name) for name in LAYOUTS}
        legal = [name for name, why in refused.items() if why is None]
        if layout != "auto" and (why := refused[layout]):
            raise ModelError(
                f"predict.layout={layout}: {why}", remedy=f"set predict.layout={' or '.join(['auto', *legal])}"
            )
        self.classifier = classifier
        if not legal:
            raise ModelError(f"no layout is legal: {refused['shared']}", remedy="use another base")
        self.layout = layout if layout != "auto" else legal[0]
        self.trim = classifier.why_not_trim(self.layout) is None
        reasons = [f"not {name}, as {why}" for name, why in refused.items() if why is not None]
        reason = "as set" if layout != "auto" else "; ".join(reasons) or "the cheapest"
        trimmed = "at the read tokens" if self.trim else f"whole, as {classifier.why_not_trim(self.layout)}"
        self.why = f"{self.layout} ({reason}); last layer {trimmed}"
        self._lay_out = BATCH_LAYOUTS[self.layout].lay_out

    def __call__(self, items: Sequence[Item]) -> tuple[Floats, int]:
        """Logits `(R, C)` of the items, in their order, and how many of them were rescued.

        Sequences with a logit that is not finite are scored again in float32, each by itself, since what is not finite
        in one can reach others through the tokens that they share. What is not finite then either is NaN. Beyond that a
        sequence's logits do not depend on what is scored beside it, but for rounding.

        Raises:
            torch.OutOfMemoryError: the items are too many for the device.
        """
        return self.collect(items, self.launch(items))

    @torch.inference_mode()
    def launch(self, items: Sequence[Item]) -> Tensor:
        """Raw logits `(R, C)` on the device. A GPU may still be computing; the next batch can be launched meanwhile."""
        with evaluating(self.classifier):
            batch = self._lay_out(self.classifier.with_rationales(items, self.layout)).to(self.classifier.device)
            logits: Tensor = self.classifier(batch.inputs, batch.read_at, batch.lengths, trim=self.trim)
        return logits

    @torch.inference_mode()
    def collect(self, items: Sequence[Item], launched: Tensor) -> tuple[Floats, int]:
        """Collect the results of launched items, as `__call__` returns them."""
        logits: Floats = launched.double().cpu().numpy()
        bad = np.flatnonzero(~_finite(logits))
        with self.classifier.computing_in_float32() if len(bad) else nullcontext():
            for index in bad.tolist():
                logits[index] = self.launch([items[index]]).double().cpu().numpy()
        finite = _finite(logits)
        logits[~finite] = np.nan
        return logits, int(finite[bad].sum())


def _finite(logits: Floats) -> NDArray[np.bool_]:
    """Which sequences have only finite logits, `(R,)`."""
    return np.asarray(np.isfinite(logits).all(axis=1))


@contextmanager
def evaluating(classifier: Classifier) -> Iterator[None]:
    """Switch dropout off within; afterwards it is as before."""
    was_training = classifier.training
    if was_training:
        classifier.eval()
    try:
        yield
    finally:
        if was_training:
            classifier.train()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next layer, in a process that only scores on a CPU.

    As it is, large blocks go back to the kernel, which hands out zeroed pages anew, layer after layer: 36 faults a
    token of a 30M Llama, and 8% of its time in batches of 2,048 tokens. The process's peak stays what it is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)


def score(
    classifier: Classifier,
    items: Sequence[Item],
    *,
    tokens_per_batch: int | None,
    layout: str = "auto",
    title: str = "score",
    visible: bool = True,
) -> Floats:
    """Logits `(N, C)` of `items`, in their order, float64.

    Args:
        classifier: the model.
        items: what to score; a row's orders stand side by side.
        tokens_per_batch: tokens in a forward pass; None: as `token_budget` has it.
        layout: `predict.layout`.
        title: of the progress bar.
        visible: whether there is one.

    Raises:
        ModelError: a logit is not finite, in float32 either; names the rows' indices.
    """
    scorer = ClassifierScorer(classifier, layout)
    budget = token_budget(tokens_per_batch, gpu=classifier.device.type == "cuda")
    logits = np.full((len(items), classifier.head.out_features), np.nan)
    with progress(title, total=len(items), visible=visible) as advance, evaluating(classifier):
        for members in _batches(items, scorer.layout, budget):
            logits[members], _ = scorer([items[index] for index in members])
            advance(len(members))
    bad = sorted({items[index].row for index in np.flatnonzero(~_finite(logits)).tolist()})
    if bad:
        rows = len({item.row for item in items})
        raise ModelError(
            f"logits are not finite for {len(bad)} of {counted(rows, 'row')}, in float32 either",
            rows=[f"number {index}" for index in bad],
            remedy="look at the model: a weight may be NaN, or the training diverged",
        )
    return logits


def _batches(items: Sequence[Item], layout: str, budget: int) -> list[list[int]]:
    """Indices of the items of each forward pass; the orders of a row stay together where the layout wants it.

    Where the layout computes once what many sequences begin with, such as examples, it counts once, as in a prediction.
    """
    record, rows = LAYOUTS[layout], dict[int, list[int]]()
    for index, item in enumerate(items):
        rows.setdefault(item.row if record.together else index, []).append(index)
    units, once = list(rows.values()), 0
    if record.shares:
        starts, once = common_starts([item.ids for item in items])
        lengths = np.array([len(item.ids) for item in items])
        own = np.maximum(lengths - starts, -(-lengths // MAX_SHARING))
        sizes = [int(own[unit].sum()) for unit in units]
    else:
        computed = [record.computed([len(items[index].ids) for index in unit]) for unit in units]
        sizes = [int(record.sizes(np.array(lengths)).sum()) for lengths in computed]
    return [
        [index for unit in members for index in units[unit]]
        for members in by_token_budget(sizes, max(1, budget - once), padded=record.pads)
    ]


def by_order(items: Sequence[Item], logits: Floats, rows: int) -> Floats:
    """Logits of items `(M, C)` as `(rows, O, C)`: each row's orders, in their own columns."""
    split = np.full((rows, 1 + max(item.order for item in items), logits.shape[1]), np.nan)
    for item, values in zip(items, logits, strict=True):
        split[item.row, item.order] = values
    return split
