"""How much memory a prediction will take, said before its first batch.

Its largest forward pass is rehearsed: torch goes through it with tensors that have a shape and no contents, and the
bytes that are alive at once are counted. Nothing is computed, and nothing is fitted to an architecture or a layout.
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

from pairclf.inference.backlog import Inputs
from pairclf.jobs.estimate import memory_now, memory_to_have, peak_memory
from pairclf.jobs.scoring import Scorer
from pairclf.model.batch import Item
from pairclf.model.engine import layout_of

HEAP_LARGEST = 1 << 25
"""Bytes of the largest tensor that glibc takes from its heap, once it has freed one like it (M_MMAP_THRESHOLD's limit
on 64 bits); larger ones are given back to the system when they are freed."""

HEAP_HOLES = 4.5
"""What the heap keeps in holes at the peak, in tensors of the largest kind that lie in it: 3 to 7 were measured (30M
Llama and Gemma-2, float32, packed and shared, 2,048 and 16,384 tokens)."""

PART = 1 / 8
"""Of two orders of a row, what both begin with in the rehearsal: a prompt's usual part."""

SCALES = (1 / 8, 1 / 4, 1 / 2)
"""Sizes of the passes that are made where one can't be rehearsed."""

WARM_UP = 256
"""Tokens of the pass that loads libraries, before it is looked at what the process holds."""

SPARE = {"cpu": 1.0, "cuda": 0.95}
"""What may be used of what is there: CUDA's allocator leaves gaps that can't be used."""

_NOT_REHEARSED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class Largest(NamedTuple):
    """The largest forward pass of a prediction.

    Attributes:
        longest: tokens of the longest sequence.
        tokens_per_batch: the budget.
        orders: in how many orders a row goes through the model together; a row that is over the budget goes alone.
    """

    longest: int
    tokens_per_batch: int
    orders: int

    @classmethod
    def of(cls, inputs: Inputs, budget: int) -> Largest:
        """That these inputs can need with such a budget."""
        lengths = inputs.lengths
        return cls(int(lengths.max()), min(budget, int(lengths.sum())), lengths.shape[1])

    @property
    def tokens(self) -> int:
        """What it computes at most."""
        return max(self.tokens_per_batch, self.orders * self.longest)

    def scaled(self, by: float) -> Largest:
        """A smaller one of the same form."""
        return Largest(max(2, round(by * self.longest)), max(2, round(by * self.tokens_per_batch)), self.orders)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a process at the peak of a prediction.

    Attributes:
        before: its peak so far, loading included.
        held: what it has between passes: the model, libraries, the rows.
        live: tensors that are alive at once in the largest pass.
        heap: what C's heap keeps besides, on a CPU.
        available: what the process can have in all.
    """

    before: int
    held: int
    live: int
    heap: int
    available: int

    @property
    def peak(self) -> int:
        """To be compared with `jobs.estimate.peak_memory` in the end."""
        return max(self.before, self.held + self.live + self.heap)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    def __str__(self) -> str:
        """`1.2 GB of 21.0 GB (held 0.6, a pass 0.5, heap 0.1)`."""
        parts = f"held {self.held / 1e9:.2f}, a pass {self.live / 1e9:.2f}"
        heap = f", heap {self.heap / 1e9:.2f}" if self.heap else ""
        return f"{self.peak / 1e9:.2f} GB of {self.available / 1e9:.2f} GB ({parts}{heap})"


def footprint(scorer: Scorer, largest: Largest, *, processes: int = 1) -> Footprint:
    """Foretell the peak of a prediction; a short pass is made, and the largest one rehearsed.

    Call it in the process that will predict, when the model is loaded and before the first batch.

    Args:
        scorer: the model in its layout.
        largest: the largest pass.
        processes: how many such processes share the memory of this machine, or of this GPU.
    """
    device = scorer.classifier.device
    _go_through(scorer, _made_up(scorer.layout, Largest(WARM_UP, WARM_UP, 1)), nullcontext())
    tensors = _tensors(scorer, largest)
    at_once = memory_to_have(device, processes) * SPARE[device.type]
    heap = HEAP_HOLES * tensors.largest if device.type == "cpu" else 0.0
    return Footprint(peak_memory(device), memory_now(device), round(tensors.live), round(heap), round(at_once))


def fitting_budget(scorer: Scorer, largest: Largest, *, processes: int = 1) -> int:
    """The budget of tokens, halved until the prediction fits; as far as it makes passes smaller."""
    smaller = largest
    while not footprint(scorer, smaller, processes=processes).fits and smaller.tokens == smaller.tokens_per_batch:
        smaller = smaller._replace(tokens_per_batch=smaller.tokens_per_batch // 2)
    return smaller.tokens_per_batch


# --- the rehearsal ---------------------------------------------------------------------------------------------------


class _Tensors(NamedTuple):
    """Bytes alive at once, and of the largest tensor that lies in C's heap."""

    live: float
    largest: float


def _tensors(scorer: Scorer, largest: Largest) -> _Tensors:
    """Of the largest pass; where an operation has no shape function (LLM.int8's), extrapolated from smaller passes."""
    try:
        return _go_through(scorer, _made_up(scorer.layout, largest), FakeTensorMode(allow_non_fake_inputs=True))
    except _NOT_REHEARSED:
        smaller = [_go_through(scorer, _made_up(scorer.layout, largest.scaled(by)), nullcontext()) for by in SCALES]
        live = np.polyval(np.polyfit(SCALES, [one.live for one in smaller], 2), 1.0)
        return _Tensors(float(live), min(float(HEAP_LARGEST), smaller[-1].largest / SCALES[-1]))


@torch.no_grad()  # in inference mode the counter would be handed composite operations whole, idle dropout as a copy
def _go_through(scorer: Scorer, items: Sequence[Item], how: AbstractContextManager[Any]) -> _Tensors:
    """Count in a pass as the scorer makes it, within `how`."""
    classifier, counter = scorer.classifier, _Counter()
    batch = layout_of("decoder", "head", scorer.layout)(items).to(classifier.device)
    was_training = classifier.training
    classifier.eval()
    try:
        with how, counter:
            classifier(batch.inputs, batch.read_at, batch.lengths, trim=scorer.trim)
    finally:
        classifier.train(was_training)
    return _Tensors(counter.peak, counter.largest)


def _made_up(layout: str, largest: Largest) -> list[Item]:
    """Sequences that fill a pass; the orders of a row begin alike."""
    random = np.random.default_rng(0)
    common = int(PART * largest.longest) if layout == "shared" and largest.orders > 1 else 0
    left, items = largest.tokens, list[Item]()
    while left > 0:
        order = len(items) % largest.orders
        start = items[-1].ids[:common] if order else random.integers(1, 100, common)
        size = min(largest.longest, left + (common if order else 0))
        if layout == "padded" and items and size < largest.longest:
            break
        ids = np.concatenate([start, random.integers(1, 100, max(1, size - common))]).astype(np.int32)
        items.append(Item(len(items) // largest.orders, order, ids))
        left -= len(ids) - (common if order else 0)
    return items


def _plain(parameter: Parameter) -> Tensor:
    """The tensor in a parameter: torch 2.11 rehearses with no class of parameters but its own, as bitsandbytes' are."""
    with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
        return parameter.data


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages from the operation that makes them to their end.

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
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = func(*args, **kwargs)
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given | self._known:
                self._begin(one.untyped_storage())
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
