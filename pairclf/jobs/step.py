"""One optimizer step: its rows through the model, their loss, its gradient, and what is done when one of them fails.

The loss is computed here and not in the model, as a mean over the rows of the whole step: 8 rows in one batch, 4 x 2
rows and two processes with 4 rows each give the same gradient (transformers' own classifiers lose the count under
accumulation: https://github.com/huggingface/transformers/issues/47688).
"""

from __future__ import annotations

import gc
import hashlib
import json
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

from pairclf.config import Config
from pairclf.console import console
from pairclf.errors import DataError, ModelError
from pairclf.inputs.plan import computed_tokens, micro_batches
from pairclf.inputs.render import Encoded
from pairclf.jobs.losses import cross_entropy, disagreement, distillation, smoothed
from pairclf.jobs.optimizers import MovingAverage
from pairclf.model.batch import Batch, Item
from pairclf.model.engine import Classifier, layout_of
from pairclf.task import AB, BA, Row

Members = NDArray[np.int64]
"""Indices of the rows of one step, those of other processes included."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The training rows as the loop needs them.

    Attributes:
        ids: the rows' ids.
        encoded: each row in its orders; from a token cache, it is made when it is asked for.
        lengths: tokens of each row, the same in either order.
        targets: `(N, 2, C)`, a target an order, smoothed.
        weights: `(N,)`.
        teachers: `(N, 2, C)` probabilities, NaN where a row has none; or nothing.
        fingerprint: of all that the rows hold, teachers included.
    """

    ids: list[str]
    encoded: Sequence[tuple[Encoded, ...]]
    lengths: list[int]
    targets: Tensor
    weights: Tensor
    teachers: Tensor | None
    fingerprint: str


def fingerprint(rows: Sequence[Row]) -> str:
    """Hex SHA-256 of rows: ids, texts, targets, weights, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        plain = [row.id, {name: list(turns) for name, turns in row.fields.items()}, row.target, row.weight]
        digest.update(json.dumps(plain, sort_keys=True).encode())
    return digest.hexdigest()


def fingerprint_of_examples(rows: Sequence[Row], teachers: NDArray[np.float64] | None) -> str:
    """`fingerprint` of training rows, and that of their teachers' probabilities `(N, C)` behind it."""
    known = b"" if teachers is None else np.ascontiguousarray(teachers).tobytes()
    return fingerprint(rows) + hashlib.sha256(known).hexdigest()


def prepare(
    rows: Sequence[Row],
    encoded: Sequence[tuple[Encoded, ...]],
    config: Config,
    teachers: NDArray[np.float64] | None = None,
) -> Examples:
    """Lay out the rows' targets, swapped where the text is, beside what the model sees of them.

    Args:
        rows: labelled rows.
        encoded: the same rows as the model sees them.
        config: its task and label smoothing.
        teachers: `(N, C)` probabilities; NaN where a row has none.

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
    targets = smoothed(torch.tensor([row.target for row in rows]), config.train.label_smoothing, task)
    return Examples(
        ids=[row.id for row in rows],
        encoded=encoded,
        lengths=[len(shown[AB].ids) for shown in encoded],
        targets=_both(targets, task.swapped_columns),
        weights=weights,
        teachers=None if teachers is None else _both(torch.from_numpy(teachers).float(), task.swapped_columns),
        fingerprint=fingerprint_of_examples(rows, teachers),
    )


def _both(columns: Tensor, swapped: Sequence[int]) -> Tensor:
    """`(N, C)` -> `(N, 2, C)`: as it is for order AB, its columns exchanged for BA."""
    return torch.stack([columns, columns[:, list(swapped)]], dim=1)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that the training looks at and never learns from.

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
class Learner:
    """What learns from what: the model, what moves it, and its rows.

    Attributes:
        config: the resolved config.
        examples: the rows.
        accelerator: as `launch.make_accelerator` makes it.
        classifier: the model itself.
        model: the same as an engine wraps it; without one, the classifier.
        optimizer: as `accelerator.prepare` returns it.
        weights: trained weights by name.
        peaks: the highest rate of each of the optimizer's groups.
        average: moving average of the weights, or none.
        engine: whether DeepSpeed or FSDP reduce gradients and take the step.
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
        """The rate of the first group, as it is now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def batches(self, members: Members, budget: int | None, process: int) -> list[list[int]]:
        """The micro-batches of one process; see `plan.micro_batches`."""
        train = self.config.train
        return micro_batches(
            members,
            self.examples.lengths,
            train.rows_per_batch,
            process=process,
            processes=self.accelerator.num_processes,
            tokens_per_batch=budget,
            orders=train.orders,
            padded=train.layout == "padded",
        )

    def tokens(self, rows: Sequence[int], *, padded: bool) -> int:
        """What a forward pass over `rows` computes, with padding or without."""
        return computed_tokens(rows, self.examples.lengths, orders=self.config.train.orders, padded=padded)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Sums over all processes, of one step.

    Attributes:
        loss: mean over the step's rows and orders.
        tokens: real ones.
        computed: with padding.
        stopping: whether any process got a signal.
    """

    loss: float
    tokens: float
    computed: float
    stopping: bool


def orders_shown(config: Config, members: Members, step: int) -> dict[int, tuple[int, ...]]:
    """For each row of the step, the orders it is shown in; independent of micro-batches and processes."""
    if config.train.swap == "random":
        coins = np.random.default_rng((config.seed, step)).integers(0, 2, len(members))
        return {row: (int(coin),) for row, coin in zip(members.tolist(), coins, strict=True)}
    return dict.fromkeys(members.tolist(), (AB, BA) if config.train.swap == "both" else (AB,))


def within_memory(
    learner: Learner, members: Members, step: int, budget: int | None, *, asked: Callable[[], bool] = bool
) -> tuple[Outcome, int | None]:
    """`accumulate`, again with half the tokens a batch where the GPU's memory did not suffice; the result is the same.

    Returns:
        What came of it, and the budget to go on with.

    Raises:
        ModelError: a row alone does not fit.
    """
    while (outcome := accumulate(learner, members, step, budget, asked=asked)) is None:
        learner.optimizer.zero_grad()
        gc.collect()  # the failed pass's activations, which its traceback held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget = _halved(learner, members, budget)
        if learner.accelerator.is_main_process:
            console.print(f"out of memory at step {step}: train.tokens_per_batch={budget} from here on")
    return outcome, budget


def _halved(learner: Learner, members: Members, budget: int | None) -> int:
    """Half of the largest batch that can still be split, over all processes: they must agree."""
    examples, train = learner.examples, learner.config.train
    dealt = [learner.batches(members, budget, process) for process in range(learner.accelerator.num_processes)]
    several = [batch for batches in dealt for batch in batches if len(batch) > 1]
    if not several:
        longest = max(members.tolist(), key=examples.lengths.__getitem__)
        raise ModelError(
            f"the memory does not suffice for one row of {examples.lengths[longest]:,} tokens, x {train.orders} orders",
            rows=[examples.ids[longest]],
            remedy="set train.gradient_checkpointing=true, or lower inputs.max_length or model.lora.rank",
        )
    return max(1, max(learner.tokens(batch, padded=train.layout == "padded") for batch in several) // 2)


def accumulate(
    learner: Learner, members: Members, step: int, budget: int | None = None, *, asked: Callable[[], bool] = bool
) -> Outcome | None:
    """Forward and backward over the rows of one optimizer step, micro-batch by micro-batch.

    Args:
        learner: whose gradients are filled.
        members: the rows of this step.
        step: its number; it seeds dropout and, under `train.swap=random`, the choice of orders.
        budget: most tokens in a micro-batch.
        asked: whether this process was asked to stop by now, which all are told; `bool()` is False.

    Returns:
        None, if the memory of any process did not suffice: gradients are then half done.
    """
    accelerator = learner.accelerator
    # Drawn anew from the step's number: a training that goes on, or a step that is done again, needs no saved state.
    seeds = np.random.SeedSequence((learner.config.seed, step, accelerator.process_index))
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    sums, failed = torch.zeros(3, dtype=torch.float64, device=accelerator.device), False
    try:
        sums = _backward(learner, members, step, budget)
    except torch.OutOfMemoryError as error:
        if learner.engine:  # the other processes wait inside its collective operations
            remedy = "lower train.tokens_per_batch, and go on with --resume"
            raise ModelError(f"out of memory at step {step}", remedy=remedy) from error
        failed = True
    accelerator.sync_gradients = True  # else Accelerate's optimizer neither steps nor clears its gradients
    flags = sums.new_tensor([failed, asked()])
    loss, tokens, computed, out_of_memory, stopping = accelerator.reduce(torch.cat([sums, flags]), "sum").tolist()
    if out_of_memory:
        return None
    if not learner.engine and accelerator.num_processes > 1:
        for one in learner.weights.values():
            one.grad = accelerator.reduce(one.grad if one.grad is not None else torch.zeros_like(one), "sum")
    return Outcome(loss, tokens, computed, bool(stopping))


def _backward(learner: Learner, members: Members, step: int, budget: int | None) -> Tensor:
    """This process's part of the step: its loss, its tokens, and those with padding, `(3,)` float64."""
    accelerator, config, examples = learner.accelerator, learner.config, learner.examples
    orders = orders_shown(config, members, step)
    total = sum(float(examples.weights[row]) * len(orders[row]) for row in members.tolist())
    batches = learner.batches(members, budget, accelerator.process_index)
    lay_out, padded = layout_of("decoder", "head", config.train.layout), config.train.layout == "padded"
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for index, rows in enumerate(batches):
        if not rows and not learner.engine:
            continue
        # A process without rows of its own still takes part in an engine's reduction, with weight zero.
        shown = rows or members[:1].tolist()
        items = [Item(row, order, examples.encoded[row][order].ids) for row in shown for order in orders[row]]
        batch = lay_out(items).to(accelerator.device)
        accelerator.sync_gradients = index == len(batches) - 1  # DeepSpeed takes its step where this is true
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(learner.model):
            logits = learner.model(batch.inputs, batch.read_at, batch.lengths)
            part = batch_loss(logits, batch, examples, config) * bool(rows) / total
            accelerator.backward(part * accelerator.num_processes if learner.engine else part)  # engines take the mean
        counts = [learner.tokens(rows, padded=False), learner.tokens(rows, padded=padded)]
        sums += torch.stack([part.detach().double(), *sums.new_tensor(counts)])
    return sums


def batch_loss(logits: Tensor, batch: Batch, examples: Examples, config: Config) -> Tensor:
    """The weighted sum of the losses of a batch's rows, a scalar; divided by the step's weights it is their mean.

    Args:
        logits: `(R, C)`, those of a row's orders one after another.
        batch: which row and order each logit belongs to.
        examples: targets, weights and teachers of all rows.
        config: `train.distill`, `train.consistency`.
    """
    train, task = config.train, config.task
    weights = examples.weights[batch.row_at].to(logits)
    targets = examples.targets[batch.row_at, batch.order].to(logits)
    losses = cross_entropy(logits, targets, task)
    if examples.teachers is not None:
        taught = examples.teachers[batch.row_at, batch.order].to(logits)
        losses = train.distill.ce * losses + distillation(logits, taught, train.distill)
    if train.consistency:
        ab, ba = (torch.nonzero(batch.order == order).flatten().to(logits.device) for order in (AB, BA))
        apart = disagreement(logits[ab], logits[ba], task).repeat_interleave(2)  # a row's share, once for each order
        losses = losses + train.consistency * apart
    return losses @ weights


def apply(learner: Learner, clip: float | None, loss: float) -> tuple[bool, float]:
    """Take the step with the gradients that `accumulate` left, unless they or the loss are not finite.

    Returns:
        Whether it was taken, and the gradient's norm before clipping.
    """
    accelerator = learner.accelerator
    found = accelerator.clip_grad_norm_(learner.model.parameters(), math.inf if clip is None else clip)
    norm = 0.0 if found is None else float(found)
    sound = math.isfinite(loss) and math.isfinite(norm)
    if sound:
        learner.optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # float16: a smaller scale may do
    learner.optimizer.zero_grad()
    return sound, norm
