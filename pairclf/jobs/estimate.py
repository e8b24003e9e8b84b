"""Whether a training fits: its operations, memory and hours, said before they are spent and held to at the end.

Nothing here is fitted to an architecture. What a forward pass keeps for its backward pass is read off the model itself,
on three short sequences; what C's heap adds to it on a CPU, off a few layers of a pass over the largest batch; and the
speed is that of a short forward pass on this device.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from pairclf.config import Config
from pairclf.inputs.plan import micro_batches, random_steps
from pairclf.model.backbone import empty_model, read_settings, resolve_base
from pairclf.model.batch import Batch, Item
from pairclf.model.engine import Classifier, layout_of

STEPS = 2000
"""Steps of the first epoch that are looked at: enough for its largest batch, or nearly."""

PROBES = (64, 128, 256)
"""Lengths of the sequences whose kept activations are counted."""

SPARE = {"cpu": 3.5, "cuda": 0.5}
"""What is needed at once besides what the forward pass keeps, in what it keeps of one layer.

In the backward pass 0.1 to 0.3 of a layer's are alive (30M Llama, float32). On a CPU the rest is C's heap, where it is
not measured.
"""

SPARE_MEASURED = 1.0
"""The same on a CPU, where it was measured what the heap adds to the forward pass."""

WATCHED = 6
"""Layers of a forward pass whose memory is measured on a CPU."""

WORTH_WATCHING = 64e6
"""Bytes that a layer keeps of the largest batch; below it C's heap is small beside the process and is not measured."""

MEASURED = {"cpu": 1e10, "cuda": 5e13}
"""Floating-point operations of the pass whose speed is measured, at most, unless one short sequence takes more."""

# --- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations of a forward pass over a sequence of `T` tokens: `linear * T + quadratic * T**2`.

    Attributes:
        linear: two for each weight of a linear layer, adapters included.
        quadratic: attention's, the half under the causal mask.
        trained: the part of `linear` whose weights are trained.
        reached: the part of the layers, from 0 to 1, that a backward pass goes through: it ends at the first trained
            weight, so that layers below the first adapter need none.
    """

    linear: float
    quadratic: float
    trained: float
    reached: float

    def of(self, lengths: ArrayLike) -> float:
        """Of one forward pass over sequences of these lengths."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return float(self.linear * tokens.sum() + self.quadratic * (tokens**2).sum())


def cost_of(config: Config) -> Cost:
    """The cost of the base model, all of it trained, from its config alone: no weights are read."""
    return cost_of_model(empty_model(read_settings(resolve_base(config.model.base))))


def cost_of_model(backbone: nn.Module) -> Cost:
    """The cost of a backbone as it stands, quantised or not, with adapters or without.

    A weight of a linear layer takes two operations a token. Attention takes, in each layer, four operations for each
    pair of positions, head and dimension of a head (keys that several heads share save memory, not operations); under a
    causal mask half of the pairs count. Sliding windows, norms, activations and the head are left out.
    """
    text = backbone.config.get_text_config()  # type: ignore[union-attr, operator]
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    linears = _linears(backbone)
    trained = [name for name, one in backbone.named_parameters() if one.requires_grad]
    first = min((max(0, _layer(name)) for name in trained), default=layers)
    return Cost(
        linear=2.0 * sum(map(_weights, linears)),
        quadratic=2.0 * layers * width,
        trained=2.0 * sum(_weights(one) for one in linears if one.weight.requires_grad),
        reached=1 - first / layers,
    )


def _linears(backbone: nn.Module) -> list[nn.Linear]:
    return [one for one in backbone.modules() if isinstance(one, nn.Linear)]


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features  # a quantised weight is packed: numel() would be half of it


def _layer(name: str) -> int:
    """`layers.7.mlp.up_proj.weight` -> 7; what stands outside the layers counts as below them all."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def training_operations(cost: Cost, lengths: ArrayLike, *, recompute: bool) -> float:
    """Of one forward and backward pass over sequences of these lengths.

    The backward pass takes the forward's operations once more for the gradients of the activations, in the layers that
    it reaches, and once more for those of the trained weights: 3x a forward pass if the whole model is trained, little
    over 2x with adapters. Attention has two products in the forward pass and four in the backward one.

    Args:
        cost: of the model with its adapters.
        lengths: tokens of each sequence, padding included where it is to count.
        recompute: add the second forward pass of gradient checkpointing. It is executed, and counts for hours; MFU
            leaves it out, as it does the recomputation within fused attention (PaLM, appendix B:
            https://arxiv.org/abs/2204.02311; unlike there, the masked half of attention is left out as well).
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    reached = 1.0 if recompute else cost.reached  # checkpointing lets gradients run down to the embedding
    linear = (1 + recompute + reached) * cost.linear + cost.trained
    quadratic = (1 + recompute + 2 * reached) * cost.quadratic
    return float(linear * tokens.sum() + quadratic * (tokens**2).sum())


# --- devices ---------------------------------------------------------------------------------------------------------

PEAK: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "P100": 18.7e12,
}
"""Peak FLOP/s at 16 bits, dense, accumulated in float32, by the words of a GPU's name; the first that is in it counts.

From NVIDIA's data sheets (which state twice as much where "with sparsity" is written) and, for the RTX cards, the
Ampere and Ada white papers. P100 has no tensor cores: its plain float16.
"""


def peak_of(device: torch.device) -> float | None:
    """Peak FLOP/s that an MFU is measured against; None where it is not known, as on a CPU."""
    return peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of_name(name: str) -> float | None:
    """`NVIDIA H100 80GB HBM3` -> H100's; whole words alone count: an L40S is no L4."""
    words = name.replace("-", " ").split()
    return next((peak for known, peak in PEAK.items() if set(known.split()) <= set(words)), None)


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has had so far: CUDA's allocated, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from now on, where it can be told to: a CPU process keeps its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_now(device: torch.device) -> int:
    """What this process has now, in the bytes that `peak_memory` counts."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def give_back_freed_memory() -> None:
    """Let glibc return to the kernel what it holds of freed memory, so that it can be seen what comes anew."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def memory_to_have(device: torch.device, processes: int) -> int:
    """What each of so many processes can have in all: what it has, and its part of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return memory_now(device) + free // processes


# --- the forecast ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a training will take, as far as can be said before it.

    Attributes:
        memory_bytes: peak of a process, to be compared with `peak_memory`.
        available_bytes: what a process can have.
        parts: what `memory_bytes` is the sum of, in bytes.
        seconds: of the steps, without evaluation, checkpoints and loading.
        why: how the seconds were derived.
    """

    memory_bytes: float
    available_bytes: float
    parts: dict[str, float]
    seconds: float
    why: str


def forecast(
    config: Config,
    classifier: Classifier,
    lengths: Sequence[int],
    *,
    rows_seen: float,
    device: torch.device,
    processes: int,
) -> Forecast:
    """Predict the memory and time of a training; takes about a second.

    Call it after adapters are on and before the first step, on the bare classifier: it runs short passes. What
    DeepSpeed and FSDP spread over processes is counted whole.

    Args:
        config: the resolved config.
        classifier: what will be trained, on `device`.
        lengths: tokens of each training row in one order.
        rows_seen: rows over the whole training, each time they are seen.
        device: where it is trained.
        processes: how many train at once.
    """
    sample = _sample(config, lengths, rows_seen, processes)
    give_back_freed_memory()  # what loading took and freed
    parts = _held(config, classifier, device)
    parts["activations"] = _activations(config, classifier, sample.batches)
    seconds, why = _seconds(config, classifier, sample)
    return Forecast(
        memory_bytes=max(sum(parts.values()), peak_memory(device)),
        available_bytes=memory_to_have(device, processes),
        parts=parts,
        seconds=seconds * rows_seen / sample.rows,
        why=why,
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """Of the first epoch's steps: what the busiest process computes, and how many rows all of them do.

    Attributes:
        batches: for each forward pass, the lengths of its sequences, padding included.
        rows: rows of the steps.
    """

    batches: list[list[int]]
    rows: int


def _sample(config: Config, lengths: Sequence[int], rows_seen: float, processes: int) -> _Sample:
    """Up to `STEPS` of the very steps that training will begin with."""
    train = config.train
    orders, padded = train.orders, train.layout == "padded"
    steps = random_steps(len(lengths), train.rows_per_step, seed=config.seed, epoch=0)
    batches, rows = [], 0
    for members in islice(steps, min(STEPS, math.ceil(rows_seen / train.rows_per_step))):
        dealt = micro_batches(
            members,
            lengths,
            train.rows_per_batch,
            process=0,  # the longest row of each round is dealt to it
            processes=processes,
            tokens_per_batch=train.tokens_per_batch,
            orders=orders,
            padded=padded,
        )
        for batch in filter(None, dealt):
            sizes = [lengths[row] for row in batch]
            batches.append((len(sizes) * [max(sizes)] if padded else sizes) * orders)
        rows += len(members)
    return _Sample(batches, rows)


def _held(config: Config, classifier: Classifier, device: torch.device) -> dict[str, float]:
    """Bytes that are held from the first step to the last."""
    train = config.train
    tensors = [*classifier.parameters(), *classifier.buffers()]
    trained = [one for one in classifier.parameters() if one.requires_grad]
    base = sum(one.nbytes for one in tensors) - sum(one.nbytes for one in trained)
    weights = float(sum(one.nbytes for one in trained))
    held = {
        "process": float(max(0, memory_now(device) - base - weights)),  # libraries, scales of quantised weights
        "base": float(base),
        "trained": weights,
        "gradients": weights,
        "optimizer": float(sum(state_bytes(train.optimizer, one) for one in trained)),
    }
    if train.ema is not None:
        held["average"] = 4.0 * sum(one.numel() for one in trained)
    return held


def state_bytes(optimizer: str, weight: Tensor) -> float:
    """What the optimizer keeps for one weight tensor."""
    if optimizer == "adafactor":  # a mean square for each row and each column
        return 4.0 * (sum(weight.shape[-2:]) * math.prod(weight.shape[:-2]) if weight.ndim > 1 else weight.numel())
    if optimizer.startswith("paged") and weight.is_cuda and weight.numel() >= 100_000:
        return 0.0  # managed memory, which CUDA's allocator does not count and the driver may move away
    if optimizer.endswith("8bit") and weight.numel() >= 4096:  # bitsandbytes leaves smaller tensors at 32 bits
        return 2 * (1 + 4 / 256) * weight.numel()  # a scale of 4 bytes a block of 256
    return 8.0 * weight.numel()


# --- activations -----------------------------------------------------------------------------------------------------


def _activations(config: Config, classifier: Classifier, batches: Sequence[Sequence[int]]) -> float:
    """Bytes that the forward and backward pass of the largest of these batches need at their peak.

    Args:
        config: the resolved config.
        classifier: what will be trained.
        batches: the lengths in each.
    """
    kept = kept_by_length(config, classifier)
    backbone: Any = classifier.backbone
    kind, checkpointing = classifier.device.type, config.train.gradient_checkpointing
    layers: int = backbone.config.get_text_config().num_hidden_layers
    reached = max(1, round(cost_of_model(backbone).reached * layers))
    of_layer = kept * [0.0, 1 / reached, 1 / reached]
    forward = kept * [0.0, 1.0, 1.0]
    if checkpointing:  # each layer's input
        embedding = backbone.get_input_embeddings()
        forward = np.array([0.0, layers * embedding.embedding_dim * embedding.weight.element_size(), 0.0])
    largest = max(batches, key=lambda batch: float(forward @ _sums(batch)))
    layer, held = float(of_layer @ _sums(largest)), float(forward @ _sums(largest))
    spare = SPARE[kind] + checkpointing  # while a layer is recomputed it is whole
    if kind == "cpu" and layer >= WORTH_WATCHING:
        spare = SPARE_MEASURED + checkpointing
        holes = max(0.0, grown_by_layer(config, classifier, largest, skipped=layers - reached) - layer)
        held += (layers if checkpointing else reached) * holes  # as large if the layer's tensors are not kept
    if config.model.quantization != "none":
        held += max(map(_weights, _linears(backbone))) * classifier.dtype.itemsize  # one weight, dequantised
    return float(kept[0]) + held + layer * spare


class _SeenError(Exception):
    """As many layers as are watched have run."""


def grown_by_layer(config: Config, classifier: Classifier, lengths: Sequence[int], *, skipped: int) -> float:
    """Bytes by which a layer's forward pass makes this process grow, in a pass over a batch of these lengths.

    It is more than what autograd keeps: glibc before 2.38 seldom gives a freed aligned block out again for one of the
    same size (https://sourceware.org/bugzilla/show_bug.cgi?id=14581), so that each layer leaves holes in the heap. The
    pass ends when `WATCHED` layers have run.

    Args:
        config: the resolved config.
        classifier: what will be trained, on a CPU.
        lengths: tokens of each sequence.
        skipped: layers at the bottom that keep nothing for the backward pass.
    """
    layers: int = classifier.backbone.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    found = [one for one in classifier.modules() if isinstance(one, nn.ModuleList) and len(one) == layers]
    sizes: list[int] = []

    def look(*_: Any) -> None:
        sizes.append(memory_now(classifier.device))
        if len(sizes) > WATCHED:
            raise _SeenError

    give_back_freed_memory()
    watched = list(found[0])[skipped:] if found else []
    handles = [layer.register_forward_pre_hook(look) for layer in watched]
    batch = _made_up(config, classifier, lengths)
    try:
        with _short_passes(classifier):
            logits = classifier(batch.inputs, batch.read_at, batch.lengths)  # held, as training holds its graph
            sizes.append(memory_now(classifier.device))
            del logits
    except _SeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    give_back_freed_memory()
    # The first layer finds an empty heap; the others are like each other.
    return (sizes[-1] - sizes[1]) / (len(sizes) - 2) if len(sizes) > 2 else 0.0


def kept_by_length(config: Config, classifier: Classifier) -> NDArray[np.float64]:
    """`(3,)`: a pass keeps `constant + linear * sum(T) + quadratic * sum(T**2)` bytes, as three probes tell."""
    shapes, kept = zip(*(kept_bytes(config, classifier, length) for length in PROBES), strict=True)
    found: NDArray[np.float64] = np.linalg.solve(np.array([_sums(shape) for shape in shapes]), np.array(kept))
    return found


def _sums(lengths: Sequence[int]) -> NDArray[np.float64]:
    """`(3,)`: 1, the sum of the lengths, the sum of their squares."""
    tokens = np.asarray(lengths, dtype=np.float64)
    return np.array([1.0, tokens.sum(), (tokens**2).sum()])


def kept_bytes(config: Config, classifier: Classifier, length: int) -> tuple[list[int], int]:
    """A short forward pass: lengths as they are computed, and bytes of all that autograd keeps of it but weights."""
    weights = {one.untyped_storage().data_ptr() for one in [*classifier.parameters(), *classifier.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # An operation that keeps its own result would hold itself, and the whole pass would never be freed.
        return tensor.detach()

    pair = [length, length - 1]  # of unlike lengths, so that a padded batch has a mask
    batch = _made_up(config, classifier, pair)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _short_passes(classifier), hooks:
        classifier(batch.inputs, batch.read_at, batch.lengths)
    return (pair if config.train.layout == "packed" else [length, length]), sum(kept.values())


def _made_up(config: Config, classifier: Classifier, lengths: Sequence[int]) -> Batch:
    """A batch of sequences of such lengths."""
    items = [Item(row=0, order=0, ids=np.ones(one, dtype=np.int32)) for one in lengths]
    return layout_of("decoder", "head", config.train.layout)(items).to(classifier.device)


@contextmanager
def _short_passes(classifier: Classifier) -> Iterator[None]:
    """Training mode, for dropout's masks, without recomputation; random numbers and the mode are as before after it."""
    devices = [classifier.device] if classifier.device.type == "cuda" else []
    was_training = classifier.training
    classifier.train()
    try:
        with torch.random.fork_rng(devices), _no_checkpointing(classifier):
            yield
    finally:
        classifier.train(was_training)


@contextmanager
def _no_checkpointing(classifier: Classifier) -> Iterator[None]:
    """While it lasts, no layer is recomputed: checkpointing hides what a layer keeps."""
    on: list[Any] = [one for one in classifier.modules() if getattr(one, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


# --- seconds ---------------------------------------------------------------------------------------------------------


def _seconds(config: Config, classifier: Classifier, sample: _Sample) -> tuple[float, str]:
    """Of the sample's steps, and how they were derived."""
    cost = cost_of_model(classifier.backbone)
    lengths = np.concatenate([np.asarray(batch) for batch in sample.batches])
    operations = training_operations(cost, lengths, recompute=config.train.gradient_checkpointing)
    sustained = _sustained(config, classifier, cost, sample.batches[len(sample.batches) // 2])
    speed = f"{sustained / 1e12:.3g} TFLOP/s in a pass just made"
    return operations / sustained, f"{operations / sample.rows / 1e9:,.3g} GFLOP a row and process, {speed}"


def _sustained(config: Config, classifier: Classifier, cost: Cost, batch: Sequence[int]) -> float:
    """FLOP/s of a forward pass over the first sequences of a batch, adapters and dequantisation included.

    Nothing is kept for a backward pass, nor any gradient made: what an engine will cut into shares is still whole here,
    and what recomputation will spare would not fit. On small models most of a pass is no matrix product.
    """
    device, most = classifier.device, MEASURED[classifier.device.type]
    lengths = [min(batch[0], max(16, int(most / cost.of([1]))))]
    for length in batch[1:]:
        if cost.of([*lengths, length]) > most:
            break
        lengths.append(length)
    taken: list[float] = []
    with _short_passes(classifier), torch.no_grad():
        while len(taken) < 2 or (len(taken) < 4 and sum(taken) < 0.5):
            start = time.perf_counter()
            inputs = _made_up(config, classifier, lengths)
            classifier(inputs.inputs, inputs.read_at, inputs.lengths)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    return cost.of(lengths) / median(taken[1:])  # the first one loads kernels and finds memory


# --- for people ------------------------------------------------------------------------------------------------------


def describe(expected: Forecast) -> str:
    """One line: `fit check: 21.3 GB of 24.0 GB (base 5.9, ...), about 7.4 h (...)`."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in expected.parts.items() if size >= 5e6)
    return (
        f"fit check: {_gigabytes(expected.memory_bytes)} of {_gigabytes(expected.available_bytes)} ({parts}), "
        f"about {_duration(expected.seconds)} ({expected.why})"
    )


def warning(expected: Forecast, config: Config) -> str | None:
    """What to do where it will not fit; None where it will."""
    if expected.memory_bytes <= expected.available_bytes:
        return None
    train = config.train
    remedies = [
        f"lower train.tokens_per_batch (now {train.tokens_per_batch or 'without limit'})",
        *(["set train.gradient_checkpointing=true"] if not train.gradient_checkpointing else []),
        *(["set train.optimizer=adamw8bit"] if train.optimizer in ("adamw", "paged_adamw") else []),
    ]
    return (
        f"fit check: {_gigabytes(expected.memory_bytes)} are expected and {_gigabytes(expected.available_bytes)} are "
        f"there: {', or '.join(remedies)}"
    )


def verdict(expected: Forecast, memory_bytes: float, seconds: float) -> str:
    """What was predicted beside what it took: `predicted 21.3 GB and 7.4 h; took 20.1 GB (-6%) and 8.0 h (+8%)`.

    Args:
        expected: as it was before the start.
        memory_bytes: `peak_memory` at the end.
        seconds: what the forecast's steps took.
    """
    memory = memory_bytes / expected.memory_bytes - 1
    # Of a few seconds, most is what only a first step takes.
    off = f" ({seconds / expected.seconds - 1:+.0%})" if max(seconds, expected.seconds) >= 30 else ""
    return (
        f"fit check: predicted {_gigabytes(expected.memory_bytes)} and {_duration(expected.seconds)}; "
        f"took {_gigabytes(memory_bytes)} ({memory:+.0%}) and {_duration(seconds)}{off}"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    """`7.4 h`, `12 min` or `40 s`."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 300 else f"{seconds:.0f} s"
