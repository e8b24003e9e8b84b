"""Estimate operations, memory and hours before training; report the estimate's error after it.

Nothing is fitted to an architecture; everything is measured on the model itself. What autograd keeps of a forward pass:
on three short sequences. What heap fragmentation adds on a CPU: on a few layers of a pass over the largest batch. The
speed: in a short forward pass on this device; on a CPU by the CPU time of the thread, as if no other process ran.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from pairclf.config import Config
from pairclf.hardware import peak_of_name
from pairclf.inputs.plan import LAYOUTS, micro_batches, random_steps
from pairclf.inputs.sequences import Item, with_branches
from pairclf.model.batch import Batch
from pairclf.model.cost import Cost, cost_of_model, count_weights, linear_layers
from pairclf.model.device_memory import give_back_freed_memory, memory_now, memory_to_have, peak_memory
from pairclf.model.engine import Classifier
from pairclf.model.families import text_settings
from pairclf.model.layouts import BATCH_LAYOUTS

SAMPLED_STEPS = 2000
"""Steps of the first epoch that are sampled, to find (nearly) its largest batch."""

PROBE_LENGTHS = (64, 128, 256)
"""Lengths of the sequences on which kept activations are measured: three, for three coefficients."""

BACKWARD_LAYERS = {"cpu": 3.5, "cuda": 0.5}
"""Extra memory of the backward pass, as a multiple of one layer's kept activations.

The backward pass itself needs 0.1 to 0.3 of a layer (30M Llama, float32). On a CPU the rest allows for heap
fragmentation, where that is not measured. The figure for CUDA was not measured on a GPU yet.
"""

BACKWARD_LAYERS_MEASURED = 1.0
"""The same on a CPU if heap fragmentation was measured."""

WATCHED_LAYERS = 6
"""Layers whose memory is measured on a CPU; they are alike, so a few suffice."""

MIN_WATCHED_BYTES = 64e6
"""Smallest activations of a layer for which fragmentation is measured; below, it is small compared to the process."""

MAX_MEASURED_OPERATIONS = {"cpu": 1e10, "cuda": 5e13}
"""Most operations of the pass in which the speed is measured, unless one short sequence takes more."""

BUSY = 0.5
"""Share of the CPU time that a process asks for, below which the machine is called busy.

A thread that waits for another one sleeps: on a free machine, with two threads, the share was 0.75.
"""


class Clocks(NamedTuple):
    """Seconds.

    Attributes:
        wall: that passed.
        cpu: in which this thread computed. While it waits for a core, or for another thread that does, none pass: on a
            machine without other work they are nearly those that passed.
    """

    wall: float
    cpu: float


def read_clocks() -> Clocks:
    return Clocks(time.perf_counter(), time.thread_time())


# --- operations ------------------------------------------------------------------------------------------------------


def training_operations(cost: Cost, lengths: ArrayLike, *, recompute: bool) -> float:
    """Operations of a forward and backward pass over sequences of these lengths.

    The backward pass takes the forward's operations once more for the gradients of the activations, in the layers that
    it reaches, and once more for those of the trained weights: 3x a forward pass if the whole model is trained, little
    over 2x with adapters. Attention has two products in the forward pass and four in the backward one.

    Args:
        cost: of the model with its adapters.
        lengths: tokens of each sequence; include padding to count it.
        recompute: add the second forward pass of gradient checkpointing. It is executed, and counts for hours; MFU
            leaves it out, as it does the recomputation within fused attention (PaLM, appendix B:
            https://arxiv.org/abs/2204.02311; unlike there, the masked half of attention is left out as well).
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    reached = 1.0 if recompute else cost.reached  # with checkpointing, gradients run down to the embedding
    linear = (1 + recompute + reached) * cost.linear + cost.trained
    quadratic = (1 + recompute + 2 * reached) * cost.quadratic
    return float(linear * tokens.sum() + quadratic * (tokens**2).sum())


# --- devices ---------------------------------------------------------------------------------------------------------


def peak_of(device: torch.device) -> float | None:
    """Peak FLOP/s of a device, for MFU; None if unknown, as on a CPU."""
    return peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


# --- the forecast ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResourceForecast:
    """Expected memory and time of a training.

    Attributes:
        memory_bytes: peak memory of a process, comparable with `peak_memory`.
        available_bytes: memory available to a process.
        parts: components of `memory_bytes`, in bytes.
        seconds: for all steps, without evaluations, checkpoints and loading; on a CPU that no other process uses.
        why: how the seconds were derived.
        share: of the CPU time that it asks for, what this process gets now, from 0 to 1; 1 where a GPU trains.
    """

    memory_bytes: float
    available_bytes: float
    parts: dict[str, float]
    seconds: float
    why: str
    share: float = 1.0


def forecast_resources(
    config: Config,
    classifier: Classifier,
    lengths: Sequence[int],
    *,
    rows_seen: float,
    device: torch.device,
    processes: int,
    clock: Callable[[], Clocks] = read_clocks,
) -> ResourceForecast:
    """Predict the memory and time of a training; takes about a second.

    It runs short passes: call it after adapters were added and before the first step, on the unwrapped classifier.
    Weights that DeepSpeed or FSDP shard over processes are counted in full.

    Args:
        config: the resolved config.
        classifier: what will be trained, on `device`.
        lengths: tokens of each training row in one order.
        rows_seen: rows of the whole training; a row counts once per epoch.
        device: where it is trained.
        processes: how many train at once.
        clock: by which passes are timed.
    """
    sample = _sample_steps(config, lengths, rows_seen, processes)
    give_back_freed_memory()  # so that memory freed after loading is not counted
    parts = _resident_bytes(config, classifier, device)
    parts["activations"] = _activations(config, classifier, sample.batches)
    seconds, why, share = _seconds(config, classifier, sample, clock)
    return ResourceForecast(
        memory_bytes=max(sum(parts.values()), peak_memory(device)),
        available_bytes=memory_to_have(device, processes if device.type == "cpu" else 1),  # a GPU has one
        parts=parts,
        seconds=seconds * rows_seen / sample.rows,
        why=why,
        share=share,
    )


@dataclass(frozen=True, slots=True)
class _StepSample:
    """Sampled steps of the first epoch: the busiest process's batches, and the rows of all processes.

    Attributes:
        batches: lengths of the sequences in each forward pass, padding included.
        rows: rows of the steps.
    """

    batches: list[list[int]]
    rows: int


def _sample_steps(config: Config, lengths: Sequence[int], rows_seen: float, processes: int) -> _StepSample:
    """Up to `SAMPLED_STEPS` of the steps with which training will begin."""
    train = config.train
    layout = LAYOUTS[train.layout]
    steps = random_steps(len(lengths), train.global_batch_size, seed=config.seed, epoch=0)
    batches, rows = list[list[int]](), 0
    for row_indices in islice(steps, min(SAMPLED_STEPS, math.ceil(rows_seen / train.global_batch_size))):
        batches_of_step = micro_batches(
            row_indices,
            lengths,
            train.per_device_train_batch_size,
            process=0,  # it gets the longest rows
            processes=processes,
            tokens_per_batch=train.tokens_per_batch,
            orders=train.orders,
            layout=layout,
        )
        batches += [
            layout.computed([lengths[row] for row in batch]) * train.orders for batch in filter(None, batches_of_step)
        ]
        rows += len(row_indices)
    return _StepSample(batches, rows)


def _resident_bytes(config: Config, classifier: Classifier, device: torch.device) -> dict[str, float]:
    """Memory that is held during the whole training, in bytes."""
    train = config.train
    tensors = [*classifier.parameters(), *classifier.buffers()]
    trained = [tensor for tensor in classifier.parameters() if tensor.requires_grad]
    base = sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in trained)
    weights = float(sum(tensor.nbytes for tensor in trained))
    parts = {
        "process": float(max(0, memory_now(device) - base - weights)),  # libraries, scales of quantised weights
        "base": float(base),
        "trained": weights,
        "gradients": weights,
        "optimizer": float(sum(state_bytes(train.optim, tensor) for tensor in trained)),
    }
    if train.ema_decay is not None:
        parts["average"] = 4.0 * sum(tensor.numel() for tensor in trained)
    return parts


def state_bytes(optimizer: str, weight: Tensor) -> float:
    """Bytes of optimizer state for one weight tensor."""
    if optimizer == "adafactor":  # one mean square for each row and column
        return 4.0 * (sum(weight.shape[-2:]) * math.prod(weight.shape[:-2]) if weight.ndim > 1 else weight.numel())
    if optimizer.startswith("paged") and weight.is_cuda and weight.numel() >= 100_000:
        return 0.0  # managed memory, which the allocator does not count and the driver may page out
    if optimizer.endswith("8bit") and weight.numel() >= 4096:  # bitsandbytes leaves smaller tensors at 32 bits
        return 2 * (1 + 4 / 256) * weight.numel()  # a scale of 4 bytes a block of 256
    return 8.0 * weight.numel()


# --- activations -----------------------------------------------------------------------------------------------------


def _activations(config: Config, classifier: Classifier, batches: Sequence[Sequence[int]]) -> float:
    """Peak bytes of activations in the forward and backward pass over the largest of these batches.

    Args:
        config: the resolved config.
        classifier: what will be trained.
        batches: lengths of the sequences in each batch.
    """
    kept = kept_coefficients(config, classifier)
    backbone: Any = classifier.backbone
    kind, checkpointing = classifier.device.type, config.train.gradient_checkpointing
    layers: int = text_settings(backbone.config).num_hidden_layers
    reached = max(1, round(cost_of_model(backbone).reached * layers))
    of_layer = kept * [0.0, 1 / reached, 1 / reached]
    forward = kept * [0.0, 1.0, 1.0]
    if checkpointing:  # each layer's input
        embedding = backbone.get_input_embeddings()
        forward = np.array([0.0, layers * embedding.embedding_dim * embedding.weight.element_size(), 0.0])
    largest = max(batches, key=lambda batch: float(forward @ _sums(batch)))
    layer, held = float(of_layer @ _sums(largest)), float(forward @ _sums(largest))
    spare = BACKWARD_LAYERS[kind] + checkpointing  # a layer is recomputed as a whole
    if kind == "cpu" and layer >= MIN_WATCHED_BYTES:
        spare = BACKWARD_LAYERS_MEASURED + checkpointing
        holes = max(0.0, heap_growth_of_layer(config, classifier, largest, skipped=layers - reached) - layer)
        held += (layers if checkpointing else reached) * holes  # also if the layer's tensors are not kept
    if config.model.quantization != "none":
        held += (
            max(map(count_weights, linear_layers(backbone))) * classifier.dtype.itemsize
        )  # the largest weight, dequantised for its product
    return float(kept[0]) + held + layer * spare


class _EnoughLayersError(Exception):
    """All watched layers have run; ends the pass."""


def heap_growth_of_layer(config: Config, classifier: Classifier, lengths: Sequence[int], *, skipped: int) -> float:
    """Bytes by which this process grows for each layer, in a forward pass over a batch of these lengths.

    It grows by more than autograd keeps: glibc before 2.38 seldom gives a freed aligned block out again for one of the
    same size (https://sourceware.org/bugzilla/show_bug.cgi?id=14581), so each layer leaves holes in the heap. The
    pass ends when `WATCHED_LAYERS` layers have run.

    Args:
        config: the resolved config.
        classifier: what will be trained, on a CPU.
        lengths: tokens of each sequence.
        skipped: lower layers that keep nothing for the backward pass.
    """
    layers: int = text_settings(classifier.backbone.config).num_hidden_layers  # type: ignore[arg-type]
    layer_lists = [
        module for module in classifier.modules() if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    sizes: list[int] = []

    def record_memory(*_: Any) -> None:
        sizes.append(memory_now(classifier.device))
        if len(sizes) > WATCHED_LAYERS:
            raise _EnoughLayersError

    give_back_freed_memory()
    watched = list(layer_lists[0])[skipped:] if layer_lists else []
    handles = [layer.register_forward_pre_hook(record_memory) for layer in watched]
    batch = _synthetic_batch(config, classifier, lengths)
    try:
        with _short_passes(classifier):
            logits = classifier(batch.inputs, batch.read_at, batch.lengths)  # kept alive, as training keeps its graph
            sizes.append(memory_now(classifier.device))
            del logits
    except _EnoughLayersError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    give_back_freed_memory()
    # Without the first layer, which fills an empty heap.
    return (sizes[-1] - sizes[1]) / (len(sizes) - 2) if len(sizes) > 2 else 0.0


def kept_coefficients(config: Config, classifier: Classifier) -> NDArray[np.float64]:
    """`(3,)`: kept bytes are `constant + linear * sum(T) + quadratic * sum(T**2)`; fitted to three probes."""
    shapes, kept = zip(*(measure_kept_bytes(config, classifier, length) for length in PROBE_LENGTHS), strict=True)
    coefficients: NDArray[np.float64] = np.linalg.solve(np.array([_sums(shape) for shape in shapes]), np.array(kept))
    return coefficients


def _sums(lengths: Sequence[int]) -> NDArray[np.float64]:
    """`(3,)`: 1, the sum of the lengths, the sum of their squares."""
    tokens = np.asarray(lengths, dtype=np.float64)
    return np.array([1.0, tokens.sum(), (tokens**2).sum()])


def measure_kept_bytes(config: Config, classifier: Classifier, length: int) -> tuple[list[int], int]:
    """Measure a short forward pass: computed lengths, and bytes that autograd keeps, weights excluded."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*classifier.parameters(), *classifier.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # Detached: an operation that keeps its own output would form a reference cycle, and never be freed.
        return tensor.detach()

    pair = [length, length - 1]  # different lengths, so that a padded batch has a mask
    batch = _synthetic_batch(config, classifier, pair)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _short_passes(classifier), hooks:
        classifier(batch.inputs, batch.read_at, batch.lengths)
    return LAYOUTS[config.train.layout].computed(pair), sum(kept.values())


def _synthetic_batch(config: Config, classifier: Classifier, lengths: Sequence[int]) -> Batch:
    """A batch of dummy sequences of these lengths."""
    branches = classifier.head.branches
    items = [Item(0, 0, with_branches(np.ones(length, dtype=np.int32), branches)) for length in lengths]
    return BATCH_LAYOUTS[config.train.layout].lay_out(items).to(classifier.device)


@contextmanager
def _short_passes(classifier: Classifier) -> Iterator[None]:
    """Training mode (dropout masks need memory) without recomputation; restores mode and random state."""
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
    """Switch gradient checkpointing off within: it hides what a layer keeps."""
    modules: list[Any] = [module for module in classifier.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


# --- seconds ---------------------------------------------------------------------------------------------------------


def _seconds(
    config: Config, classifier: Classifier, sample: _StepSample, clock: Callable[[], Clocks]
) -> tuple[float, str, float]:
    """Seconds of the sampled steps, how they were derived, and this process's share of the CPU time it asks for."""
    cost = cost_of_model(classifier.backbone)
    lengths = np.concatenate([np.asarray(batch) for batch in sample.batches])
    operations = training_operations(cost, lengths, recompute=config.train.gradient_checkpointing)
    sustained, share = _measured_speed(config, classifier, cost, sample.batches[len(sample.batches) // 2], clock)
    speed = f"{sustained / 1e12:.3g} TFLOP/s measured in a forward pass"
    return operations / sustained, f"{operations / sample.rows / 1e9:,.3g} GFLOP a row and process, {speed}", share


def _measured_speed(
    config: Config, classifier: Classifier, cost: Cost, batch: Sequence[int], clock: Callable[[], Clocks]
) -> tuple[float, float]:
    """FLOP/s of a forward pass over the first sequences of a batch, adapters and dequantisation included.

    Without gradients: the weights are not sharded yet, and checkpointing is off, so a backward pass might not fit. On
    small models most of the time is not spent in matrix products, so a peak figure would be far off.

    On a CPU the CPU time of this thread counts: a moment in which other processes have the cores would turn minutes
    into hours. The other threads compute while this one does, and wait when it waits.

    Returns:
        The speed, and the share of the CPU time asked for that this process got.
    """
    device, most = classifier.device, MAX_MEASURED_OPERATIONS[classifier.device.type]
    lengths = [min(batch[0], max(16, int(most / cost.of([1]))))]
    for length in batch[1:]:
        if cost.of([*lengths, length]) > most:
            break
        lengths.append(length)
    passes: list[Clocks] = []
    with _short_passes(classifier), torch.no_grad():
        while len(passes) < 2 or (len(passes) < 4 and sum(taken.wall for taken in passes) < 0.5):
            start = clock()
            inputs = _synthetic_batch(config, classifier, lengths)
            trim = classifier.trims_training(config.train)
            classifier(inputs.inputs, inputs.read_at, inputs.lengths, trim=trim)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            end = clock()
            passes.append(Clocks(end.wall - start.wall, end.cpu - start.cpu))
    del passes[0]  # it loads kernels and finds memory
    if device.type == "cuda":
        return cost.of(lengths) / median(taken.wall for taken in passes), 1.0
    share = sum(taken.cpu for taken in passes) / sum(taken.wall for taken in passes)
    return cost.of(lengths) / median(taken.cpu for taken in passes), min(1.0, share)


# --- messages --------------------------------------------------------------------------------------------------------


def describe(expected: ResourceForecast) -> str:
    """One line: `fit check: 21.3 GB of 24.0 GB (base 5.9, ...), about 7.4 h (...)`."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in expected.parts.items() if size >= 5e6)
    return (
        f"fit check: {_gigabytes(expected.memory_bytes)} of {_gigabytes(expected.available_bytes)} ({parts}), "
        f"about {_duration(expected.seconds)} ({expected.why})"
    )


def memory_warning(expected: ResourceForecast, config: Config) -> str | None:
    """A warning with remedies if the training will not fit into memory; else None."""
    if expected.memory_bytes <= expected.available_bytes:
        return None
    train = config.train
    remedies = [
        f"lower train.tokens_per_batch (now {train.tokens_per_batch or 'without limit'})",
        *(["set train.gradient_checkpointing=true"] if not train.gradient_checkpointing else []),
        *(["set train.optim=adamw_8bit"] if train.optim in ("adamw_torch", "paged_adamw_32bit") else []),
    ]
    return (
        f"fit check: {_gigabytes(expected.memory_bytes)} needed, {_gigabytes(expected.available_bytes)} available: "
        f"{', or '.join(remedies)}"
    )


def busy(expected: ResourceForecast) -> str | None:
    """What a machine that other processes use makes of the hours; None where the process has the cores to itself."""
    if expected.share >= BUSY:
        return None
    return (
        f"fit check: the machine is busy: this process gets {expected.share:.0%} of the CPU time that it asks for; "
        f"on a free machine this run takes about {_duration(expected.seconds)}, at today's share about "
        f"{_duration(expected.seconds / expected.share)}"
    )


def describe_error(expected: ResourceForecast, memory_bytes: float, seconds: float) -> str:
    """Predicted and actual resources: `predicted 21.3 GB and 7.4 h; took 20.1 GB (-6%) and 8.0 h (+8%)`.

    Args:
        expected: the forecast from before the training.
        memory_bytes: `peak_memory` at the end.
        seconds: actual seconds of the forecast's steps.
    """
    memory = memory_bytes / expected.memory_bytes - 1
    # In a run of seconds, most of the time is the first step's warm-up.
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
