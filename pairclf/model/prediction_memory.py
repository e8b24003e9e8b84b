"""Estimate the memory of a prediction before its first batch.

The largest forward pass is run with fake tensors, which have a shape and no contents, and the bytes alive at once are
counted. Nothing is computed, and nothing is fitted to an architecture or a layout. A small pass is run with real
tensors, because that is faster.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from pairclf.inputs.plan import LAYOUTS, SQUARE_FROM
from pairclf.inputs.sequences import Item, LargestPass, with_branches
from pairclf.model.cost import cost_of_model
from pairclf.model.device_memory import memory_now, memory_to_have, peak_memory
from pairclf.model.layouts import BATCH_LAYOUTS
from pairclf.model.rationale import MAX_CACHED
from pairclf.model.scoring import ClassifierScorer, evaluating

HEAP_LARGEST = 1 << 25
"""Bytes of the largest tensor that glibc takes from its heap, once it has freed one like it (M_MMAP_THRESHOLD's limit
on 64 bits); larger ones are given back to the system when they are freed."""

HEAP_HOLES = 4.5
"""Memory in the heap's holes at the peak, in multiples of the largest tensor in the heap: 3 to 7 were measured (30M
Llama and Gemma-2, float32, packed and shared, 2,048 and 16,384 tokens)."""

SHARED_SHARE = 1 / 8
"""Assumed share of tokens that both orders of a row have in common: the prompt's usual share."""

SCALES = (1 / 8, 1 / 4, 1 / 2)
"""Sizes of real passes, if fake tensors are not supported, from which the largest is extrapolated."""

WARM_UP = 256
"""Tokens of a warm-up pass, which loads libraries before the memory is measured."""

USABLE_SHARE = {"cpu": 1.0, "cuda": 0.95}
"""Usable share of the available memory: CUDA's allocator fragments it, by how much is a guess."""

SMALL = 2e10
"""Operations of a pass that a CPU computes in less than a second. On fake tensors a pass takes seconds of Python."""

_NOT_REHEARSED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a process at the peak of a prediction, in bytes.

    Attributes:
        before: its peak so far, loading included.
        held: memory between passes: model, libraries, rows.
        live: tensors alive at once in the largest pass, and what rationales are written with.
        heap: fragmentation of C's heap, on a CPU.
        available: memory available to the process.
    """

    before: int
    held: int
    live: int
    heap: int
    available: int

    @property
    def peak(self) -> int:
        """Expected peak in bytes, comparable with `device_memory.peak_memory`."""
        return max(self.before, self.held + self.live + self.heap)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    def __str__(self) -> str:
        """`1.2 GB of 21.0 GB (held 0.6, a pass 0.5, heap 0.1)`."""
        parts = f"held {self.held / 1e9:.2f}, a pass {self.live / 1e9:.2f}"
        heap = f", heap {self.heap / 1e9:.2f}" if self.heap else ""
        return f"{self.peak / 1e9:.2f} GB of {self.available / 1e9:.2f} GB ({parts}{heap})"


def footprint(scorer: ClassifierScorer, largest: LargestPass, *, processes: int = 1) -> Footprint:
    """Estimate the peak memory of a prediction, by a short real pass and the largest pass on fake tensors.

    Call it in the predicting process, after loading the model and before the first batch.

    Args:
        scorer: the model in its layout.
        largest: the largest pass.
        processes: number of processes that share the machine's, or the GPU's, memory.
    """
    device = scorer.classifier.device
    branches = scorer.classifier.head.branches
    _count_pass(scorer, _synthetic_items(scorer.layout, LargestPass(WARM_UP, WARM_UP, 1), branches), nullcontext())
    tensors = _tensors(scorer, largest)
    at_once = memory_to_have(device, processes) * USABLE_SHARE[device.type]
    heap = HEAP_HOLES * tensors.largest if device.type == "cpu" else 0.0
    live = tensors.live + MAX_CACHED * largest.tokens * scorer.classifier.cached_bytes()
    return Footprint(peak_memory(device), memory_now(device), round(live), round(heap), round(at_once))


def fitting_budget(scorer: ClassifierScorer, largest: LargestPass, *, processes: int = 1) -> int:
    """The token budget, halved until the prediction fits into memory, as long as that makes passes smaller."""
    smaller = largest
    while not footprint(scorer, smaller, processes=processes).fits and smaller.tokens == smaller.tokens_per_batch:
        smaller = smaller._replace(tokens_per_batch=smaller.tokens_per_batch // 2)
    return smaller.tokens_per_batch


# --- counting a pass -------------------------------------------------------------------------------------------------


class _LiveBytes(NamedTuple):
    """Bytes alive at once, and of the largest tensor that lies in C's heap."""

    live: float
    largest: float


def _tensors(scorer: ClassifierScorer, largest: LargestPass) -> _LiveBytes:
    """The live bytes of the largest pass, extrapolated from smaller passes if an operation has no shape function."""

    def synthetic(size: LargestPass) -> list[Item]:
        return _synthetic_items(scorer.layout, size, scorer.classifier.head.branches)

    if cost_of_model(scorer.classifier.backbone).linear * largest.tokens <= SMALL:
        return _count_pass(scorer, synthetic(largest), nullcontext())
    try:
        return _count_pass(scorer, synthetic(largest), FakeTensorMode(allow_non_fake_inputs=True))
    except _NOT_REHEARSED:
        smaller = [_count_pass(scorer, synthetic(largest.scaled(by)), nullcontext()) for by in SCALES]
        live = np.polyval(np.polyfit(SCALES, [counted.live for counted in smaller], 2), 1.0)
        return _LiveBytes(float(live), min(float(HEAP_LARGEST), smaller[-1].largest / SCALES[-1]))


@torch.no_grad()  # in inference mode the counter would be handed composite operations whole, idle dropout as a copy
def _count_pass(scorer: ClassifierScorer, items: Sequence[Item], how: AbstractContextManager[Any]) -> _LiveBytes:
    """Count in a pass as the scorer makes it, within `how`."""
    classifier, counter = scorer.classifier, _StorageCounter()
    batch = BATCH_LAYOUTS[scorer.layout].lay_out(items).to(classifier.device)
    with evaluating(classifier), how, counter:
        classifier(batch.inputs, batch.read_at, batch.lengths, trim=scorer.trim)
    return _LiveBytes(counter.peak, counter.largest)


def _synthetic_items(layout: str, largest: LargestPass, branches: int = 1) -> list[Item]:
    """Dummy sequences that fill a pass; the orders of a row share their start."""
    random, record = np.random.default_rng(0), LAYOUTS[layout]
    if record.pads and int(record.sizes(np.array(largest.longest))) <= largest.tokens:
        # Many rows of this length take more than fewer longer ones: they have as many scores, and more tokens.
        largest = largest._replace(longest=min(largest.longest, SQUARE_FROM))
    start, _ = record.spans(
        np.full((1, largest.orders), largest.longest), np.array([int(SHARED_SHARE * largest.longest)])
    )
    common = int(start.sum())
    left, items = largest.tokens, list[Item]()
    while left > 0:
        order = len(items) % largest.orders
        begin = items[-1].ids[:common] if order else random.integers(1, 100, common)
        size = min(largest.longest, left + (common if order else 0))
        if record.pads and items and size < largest.longest:
            break
        ids = np.concatenate([begin, random.integers(1, 100, max(1, size - common))]).astype(np.int32)
        items.append(Item(len(items) // largest.orders, order, with_branches(ids, branches)))
        left -= len(ids) - (common if order else 0)
    return items


def _plain(parameter: Parameter) -> Tensor:
    """The tensor in a parameter: torch 2.11 rehearses with no class of parameters but its own, as bitsandbytes' are."""
    with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
        return parameter.data


class _StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages, from their creation until they are freed.

    Attributes:
        peak: most bytes at once.
        largest: bytes of the largest tensor that lies in C's heap.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.largest = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Parameter, _plain, (args, kwargs or {}))
        inputs = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs | self._known:
                self._begin(tensor.untyped_storage())
        return out

    def _begin(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        if size <= HEAP_LARGEST:
            self.largest = max(self.largest, size)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
