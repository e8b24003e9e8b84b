"""One optimizer step: forward passes, loss, gradients, and retries after out-of-memory errors.

The loss is computed here and not in the model, as a mean over the rows of the whole step: 8 rows in one batch, 4 x 2
rows and two processes with 4 rows each give the same gradient (transformers' own classifiers lose the count under
accumulation: https://github.com/huggingface/transformers/issues/47688).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from pairclf.approaches.finetune.losses import LOSSES, disagreement, distillation, smoothed
from pairclf.approaches.finetune.optimizers import MovingAverage
from pairclf.config import Config
from pairclf.console import console
from pairclf.data.identity import fingerprint_of_examples
from pairclf.errors import DataError, ModelError
from pairclf.inputs.plan import LAYOUTS, computed_tokens, micro_batches
from pairclf.inputs.render import Encoded
from pairclf.inputs.sequences import Item
from pairclf.model.batch import Batch
from pairclf.model.engine import Classifier
from pairclf.model.layouts import BATCH_LAYOUTS
from pairclf.task import AB, BA, Row

RowIndices = NDArray[np.int64]
"""Row indices of one step, for all processes."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The training rows, as the training loop needs them.

    Attributes:
        ids: the rows' ids.
        encoded: each row in its orders; rows of a token cache are encoded on access.
        lengths: tokens of each row, the same in either order.
        cut: number of rows that were truncated to `inputs.max_length`.
        targets: `(N, 2, C)`, smoothed targets for each order.
        weights: `(N,)`.
        teachers: `(N, 2, C)` probabilities, NaN for rows without a teacher; None: no teachers.
        fingerprint: of the rows' contents, teachers included.
    """

    ids: list[str]
    encoded: Sequence[tuple[Encoded, ...]]
    lengths: list[int]
    cut: int
    targets: Tensor
    weights: Tensor
    teachers: Tensor | None
    fingerprint: str


def make_examples(
    rows: Sequence[Row],
    encoded: Sequence[tuple[Encoded, ...]],
    config: Config,
    teachers: NDArray[np.float64] | None = None,
) -> Examples:
    """Make training examples: targets (swapped together with the text), weights, teachers.

    Args:
        rows: labelled rows.
        encoded: the same rows as the model sees them.
        config: its task and label smoothing.
        teachers: `(N, C)` probabilities; NaN for rows without a teacher.

    Raises:
        DataError: no rows, a row without a target, or a weight that float32 can't hold.
    """
    if not rows:
        raise DataError("there are no rows to train on", remedy="check data.train, data.max_rows and the folds")
    if unlabelled := [row.id for row in rows if row.target is None]:
        raise DataError("rows without a label can't be trained on", rows=unlabelled)
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
    if wrong := [row.id for row, weight in zip(rows, weights.tolist(), strict=True) if not 0 < weight < math.inf]:
        raise DataError("weights must be above zero and within float32's range", rows=wrong)
    task = config.task
    shown = [(len(orders[AB].ids), any(orders[AB].dropped.values())) for orders in encoded]
    targets = smoothed(torch.tensor([row.target for row in rows]), config.train.label_smoothing_factor, task)
    return Examples(
        ids=[row.id for row in rows],
        encoded=encoded,
        lengths=[length for length, _ in shown],
        cut=sum(is_cut for _, is_cut in shown),
        targets=_in_both_orders(targets, task.swapped_columns),
        weights=weights,
        teachers=None
        if teachers is None
        else _in_both_orders(torch.from_numpy(teachers).float(), task.swapped_columns),
        fingerprint=fingerprint_of_examples(rows, teachers),
    )


def _in_both_orders(columns: Tensor, swapped: Sequence[int]) -> Tensor:
    """`(N, C)` -> `(N, 2, C)`: the columns for order AB, and swapped columns for BA."""
    return torch.stack([columns, columns[:, list(swapped)]], dim=1)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rows: evaluated during training, never trained on.

    Attributes:
        encoded: as the model sees them.
        targets: `(N, C)`.
        weights: `(N,)`.
        fingerprint: of all that the rows hold.
    """

    encoded: Sequence[tuple[Encoded, ...]]
    targets: NDArray[np.float64]
    weights: NDArray[np.float64]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TrainState:
    """Model, optimizer and rows of a training.

    Attributes:
        config: the resolved config.
        examples: the rows.
        accelerator: as `launch.make_accelerator` makes it.
        classifier: the model itself.
        model: the classifier as wrapped by an engine; without an engine, the classifier itself.
        optimizer: as `accelerator.prepare` returns it.
        weights: trained weights by name.
        peaks: peak learning rate of each parameter group.
        average: moving average of the weights, or None.
        engine: whether DeepSpeed or FSDP reduces gradients and takes the step.
    """

    config: Config
    examples: Examples
    accelerator: Accelerator
    classifier: Classifier
    model: nn.Module
    optimizer: Any
    weights: dict[str, nn.Parameter]
    peaks: list[float]
    average: MovingAverage | None
    engine: bool

    @property
    def rate(self) -> float:
        """`train.learning_rate` as the schedule has it now."""
        return self.config.train.learning_rate * float(self.optimizer.param_groups[0]["lr"]) / self.peaks[0]

    def batches(self, row_indices: RowIndices, budget: int | None, process: int) -> list[list[int]]:
        """The micro-batches of one process; see `plan.micro_batches`."""
        train = self.config.train
        return micro_batches(
            row_indices,
            self.examples.lengths,
            train.per_device_train_batch_size,
            process=process,
            processes=self.accelerator.num_processes,
            tokens_per_batch=budget,
            orders=train.orders,
            layout=LAYOUTS[train.layout],
        )

    def tokens(self, rows: Sequence[int]) -> int:
        """What a forward pass over `rows` computes, padding included."""
        train = self.config.train
        return computed_tokens(rows, self.examples.lengths, orders=train.orders, layout=LAYOUTS[train.layout])


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one step, over all processes.

    Attributes:
        loss: mean over the step's rows and orders.
        tokens: real tokens.
        computed: tokens including padding.
        stop_requested: whether any process got a signal.
    """

    loss: float
    tokens: float
    computed: float
    stop_requested: bool


def orders_of_rows(config: Config, row_indices: RowIndices, step: int) -> dict[int, tuple[int, ...]]:
    """For each row of the step, the orders it is trained in; independent of micro-batches and processes."""
    if config.train.swap == "random":
        coins = np.random.default_rng((config.seed, step)).integers(0, 2, len(row_indices))
        return {row: (int(coin),) for row, coin in zip(row_indices.tolist(), coins, strict=True)}
    return dict.fromkeys(row_indices.tolist(), (AB, BA) if config.train.orders == 2 else (AB,))


def accumulate_with_oom_retry(
    state: TrainState,
    row_indices: RowIndices,
    step: int,
    budget: int | None,
    *,
    stop_requested: Callable[[], bool] = bool,
) -> tuple[StepResult, int | None]:
    """`accumulate`; after an out-of-memory error, retry with half the tokens a batch, with the same result.

    Returns:
        The result, and the token budget for the following steps.

    Raises:
        ModelError: a single row does not fit into memory.
    """
    while (result := accumulate(state, row_indices, step, budget, stop_requested=stop_requested)) is None:
        state.optimizer.zero_grad()
        gc.collect()  # free the activations that the traceback kept alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget = _halved_budget(state, row_indices, budget)
        if state.accelerator.is_main_process:
            console.print(f"out of memory at step {step}: train.tokens_per_batch lowered to {budget}")
    return result, budget


def _halved_budget(state: TrainState, row_indices: RowIndices, budget: int | None) -> int:
    """Half of the largest batch that can still be split, over all processes, so that all compute the same budget."""
    examples, train = state.examples, state.config.train
    by_process = [state.batches(row_indices, budget, process) for process in range(state.accelerator.num_processes)]
    divisible = [batch for batches in by_process for batch in batches if len(batch) > 1]
    if not divisible:
        longest = max(row_indices.tolist(), key=examples.lengths.__getitem__)
        raise ModelError(
            f"out of memory for a single row of {examples.lengths[longest]:,} tokens, x {train.orders} orders",
            rows=[examples.ids[longest]],
            remedy="set train.gradient_checkpointing=true, or lower inputs.max_length or model.lora.r",
        )
    return max(1, max(map(state.tokens, divisible)) // 2)


def accumulate(
    state: TrainState,
    row_indices: RowIndices,
    step: int,
    budget: int | None = None,
    *,
    stop_requested: Callable[[], bool] = bool,
) -> StepResult | None:
    """Forward and backward over the rows of one optimizer step, micro-batch by micro-batch.

    Args:
        learner: whose gradients are filled.
        members: the rows of this step.
        step: its number; it seeds dropout and, under `train.swap=random`, the choice of orders.
        budget: token budget of a micro-batch.
        stop_requested: whether this process was asked to stop by now, which all are told; `bool()` is False.

    Returns:
        None if any process ran out of memory: the gradients are then incomplete.
    """
    accelerator = state.accelerator
    # Seeded by the step's number: resuming a training, or retrying a step, needs no saved random state.
    seeds = np.random.SeedSequence((state.config.seed, step, accelerator.process_index))
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    sums, failed = torch.zeros(3, dtype=torch.float64, device=accelerator.device), False
    try:
        sums = _backward(state, row_indices, step, budget)
    except torch.OutOfMemoryError as error:
        if state.engine:  # the other processes are blocked in collective operations
            remedy = "lower train.tokens_per_batch, and resume with --resume"
            raise ModelError(f"out of memory at step {step}", remedy=remedy) from error
        failed = True
    accelerator.sync_gradients = True  # else Accelerate's optimizer skips step and zero_grad
    flags = sums.new_tensor([failed, stop_requested()])
    loss, tokens, computed, out_of_memory, stopping = accelerator.reduce(torch.cat([sums, flags]), "sum").tolist()
    if out_of_memory:
        return None
    if not state.engine and accelerator.num_processes > 1:
        for weight in state.weights.values():
            weight.grad = accelerator.reduce(
                weight.grad if weight.grad is not None else torch.zeros_like(weight), "sum"
            )
    return StepResult(loss, tokens, computed, bool(stopping))


def _backward(state: TrainState, row_indices: RowIndices, step: int, budget: int | None) -> Tensor:
    """This process's share of the step: loss, tokens, and tokens with padding, `(3,)` float64."""
    accelerator, config, examples = state.accelerator, state.config, state.examples
    orders = orders_of_rows(config, row_indices, step)
    total = sum(float(examples.weights[row]) * len(orders[row]) for row in row_indices.tolist())
    batches = state.batches(row_indices, budget, accelerator.process_index)
    lay_out = BATCH_LAYOUTS[config.train.layout].lay_out
    # An engine gathers a layer's weights when the layer is called, and not before, when its keys are computed.
    trim = not state.engine and state.classifier.trims_training(config.train)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for index, rows in enumerate(batches):
        if not rows and not state.engine:
            continue
        # A process without rows takes part in an engine's reduction with a dummy row of weight zero.
        shown_rows = rows or row_indices[:1].tolist()
        items = [Item(row, order, examples.encoded[row][order].ids) for row in shown_rows for order in orders[row]]
        batch = lay_out(items).to(accelerator.device)
        accelerator.sync_gradients = index == len(batches) - 1  # DeepSpeed takes its step where this is true
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(state.model):
            logits = state.model(batch.inputs, batch.read_at, batch.lengths, trim=trim)
            batch_loss_share = batch_loss(logits, batch, examples, config) * bool(rows) / total
            accelerator.backward(
                batch_loss_share * accelerator.num_processes if state.engine else batch_loss_share
            )  # engines take the mean
        counts = [config.train.orders * sum(examples.lengths[row] for row in rows), state.tokens(rows)]
        sums += torch.stack([batch_loss_share.detach().double(), *sums.new_tensor(counts)])
    return sums


def batch_loss(logits: Tensor, batch: Batch, examples: Examples, config: Config) -> Tensor:
    """Weighted sum of the losses of a batch's rows; divided by the step's total weight it is the mean.

    Args:
        logits: `(R, C)`, the orders of a row in sequence.
        batch: which row and order each logit belongs to.
        examples: targets, weights and teachers of all rows.
        config: `train.distill`, `train.consistency_weight`, `train.center_rewards_coefficient`.
    """
    train, task = config.train, config.task
    weights = examples.weights[batch.row_at].to(logits)
    targets = examples.targets[batch.row_at, batch.order].to(logits)
    losses = LOSSES[train.loss](logits, targets, task)
    if examples.teachers is not None:
        taught = examples.teachers[batch.row_at, batch.order].to(logits)
        losses = train.distill.ce_weight * losses + distillation(logits, taught, train.distill)
    if train.consistency_weight:
        ab, ba = (torch.nonzero(batch.order == order).flatten().to(logits.device) for order in (AB, BA))
        apart = disagreement(logits[ab], logits[ba], task).repeat_interleave(
            2
        )  # one value a row, for each of its orders
        losses = losses + train.consistency_weight * apart
    if train.center_rewards_coefficient is not None:
        sides = [task.classes.index(name) for name in task.swap_classes or ()]
        losses = losses + train.center_rewards_coefficient * logits[:, sides].sum(dim=1).square()
    return losses @ weights


def optimizer_step(state: TrainState, max_norm: float | None, loss: float) -> tuple[bool, float]:
    """Take an optimizer step with the accumulated gradients, unless they or the loss are not finite.

    Returns:
        Whether the step was taken, and the gradient norm before clipping.
    """
    accelerator = state.accelerator
    total_norm = accelerator.clip_grad_norm_(state.model.parameters(), math.inf if max_norm is None else max_norm)
    norm = 0.0 if total_norm is None else float(total_norm)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if is_finite:
        state.optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # float16: lower the loss scale
    state.optimizer.zero_grad()
    return is_finite, norm
