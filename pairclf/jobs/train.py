"""Fine-tuning: one visible Accelerate loop, from rows to a classifier.

The loss is computed here and not in the model, as a mean over the rows of the whole optimizer step: 8 rows in one
batch, 4 x 2 rows and two processes with 4 rows each give the same gradient (transformers' own classifiers lose the
count under accumulation: https://github.com/huggingface/transformers/issues/47688).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pairclf.config import Config, Train, dump_config
from pairclf.console import console, progress
from pairclf.errors import DataError, ModelError
from pairclf.files import write_text
from pairclf.inputs.plan import micro_batches, random_steps
from pairclf.inputs.render import Encoded
from pairclf.model.backbone import pick_dtype
from pairclf.model.batch import Item
from pairclf.model.engine import Classifier, build, layout_of
from pairclf.task import AB, BA, Row, Task


@dataclass(frozen=True, slots=True)
class Examples:
    """The training rows as the loop needs them.

    Attributes:
        encoded: each row in its orders; from a token cache, it is made when it is asked for.
        lengths: tokens of each row, the same in either order.
        targets: `(N, 2, C)`, a target an order.
        weights: `(N,)`.
    """

    encoded: Sequence[tuple[Encoded, ...]]
    lengths: list[int]
    targets: Tensor
    weights: Tensor


def train(
    config: Config,
    rows: Sequence[Row],
    encoded: Sequence[tuple[Encoded, ...]],
    folder: Path,
    accelerator: Accelerator,
) -> Classifier:
    """Fine-tune on `rows`; writes `config.yaml` and `metrics.jsonl` into `folder`.

    Args:
        config: the resolved config.
        rows: labelled rows, all of which are trained on.
        encoded: the same rows as the model sees them.
        folder: run folder of this training.
        accelerator: as `launch.make_accelerator` makes it; one process or many.

    Raises:
        DataError: no rows, or a row without a target.
        ModelError: the base can't be loaded.
    """
    # Construct
    examples = prepare(rows, encoded, config.task)
    classifier = build(config, accelerator.device)
    if config.train.gradient_checkpointing:
        _checkpoint_gradients(classifier)
    optimizer = torch.optim.AdamW(parameter_groups(classifier, config))
    steps = total_steps(config, len(rows))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(config.train, step, steps))
    model, optimizer = accelerator.prepare(classifier, optimizer)

    # Set up
    if accelerator.is_main_process:
        write_text(folder / "config.yaml", dump_config(config))
        _print_derivation(config, accelerator, classifier, rows=len(rows), steps=steps)
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout
    model.train()

    # Train
    log = _Log(folder / "metrics.jsonl", every=config.train.log_every, enabled=accelerator.is_main_process)
    with progress(f"train {folder.name}", total=steps, visible=accelerator.is_main_process) as advance:
        for number, members in enumerate(_plan(config, len(rows), steps), start=1):
            loss, tokens = accumulate(accelerator, model, config, examples, members, number)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.train.clip)
            optimizer.step()
            optimizer.zero_grad()
            _check_finite(loss, number, [rows[index].id for index in members.tolist()])
            log.add(number, loss=loss, tokens=tokens, learning_rate=optimizer.param_groups[0]["lr"], gradient_norm=norm)
            if not accelerator.optimizer_step_was_skipped:  # float16: the loss scale is still being found
                schedule.step()
            advance(note=f"loss {log.loss:.4f}")
    log.write()

    # Clean up
    trained: Classifier = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return trained.eval()


def prepare(rows: Sequence[Row], encoded: Sequence[tuple[Encoded, ...]], task: Task) -> Examples:
    """Lay out the rows' targets, swapped where the text is, beside what the model sees of them."""
    if not rows:
        raise DataError("there are no rows to train on", remedy="check data.train, data.max_rows and the folds")
    if unlabelled := [row.id for row in rows if row.target is None]:
        raise DataError("rows without a label can't be trained on", rows=unlabelled)
    targets = torch.tensor([row.target for row in rows], dtype=torch.float32)
    both = torch.stack([targets, targets[:, list(task.swapped_columns)]], dim=1)
    lengths = [len(shown[AB].ids) for shown in encoded]
    return Examples(encoded, lengths, both, torch.tensor([row.weight for row in rows]))


def accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    config: Config,
    examples: Examples,
    members: NDArray[np.int64],
    step: int,
) -> tuple[float, int]:
    """Forward and backward over the rows of one optimizer step, micro-batch by micro-batch.

    Args:
        members: indices of all rows of the step, those of other processes included.
        step: number of the step; it seeds the choice of orders under `train.swap=random`.

    Returns:
        The loss of the step (mean over its rows and orders, all processes), and the tokens that this process computed.
    """
    orders = orders_shown(config, members, step)
    share = examples.weights[members].double()
    total = float((share * torch.tensor([len(orders[row]) for row in members.tolist()])).sum())
    batches = micro_batches(
        members,
        examples.lengths,
        config.train.rows_per_batch,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    lay_out, loss, tokens = layout_of("decoder", "head", "padded"), torch.zeros((), device=accelerator.device), 0
    for index, rows in enumerate(batches):
        # A process without rows of its own still takes part in the reduction, with weight zero.
        shown = rows or members[:1].tolist()
        items = [Item(row, order, examples.encoded[row][order].ids) for row in shown for order in orders[row]]
        batch = lay_out(items).to(accelerator.device)
        weights = examples.weights[batch.row_at] * bool(rows)
        accelerator.sync_gradients = index == len(batches) - 1  # DeepSpeed takes its step where this is true
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            logits = model(batch.inputs, batch.read_at, batch.lengths)
            targets = examples.targets[batch.row_at, batch.order]
            part = row_losses(logits, targets.to(logits), config.task) @ weights.to(logits) / total
            accelerator.backward(part * accelerator.num_processes)  # the reduction divides by the processes
        loss += part.detach()
        tokens += batch.tokens
    return float(accelerator.reduce(loss, "sum")), tokens


def _check_finite(loss: float, step: int, ids: Sequence[str]) -> None:
    if not math.isfinite(loss):
        raise ModelError(
            f"the loss of step {step} is {loss}: training has diverged",
            rows=ids,
            remedy="lower train.learning_rate or train.head_learning_rate, or set model.dtype=float32",
        )


def orders_shown(config: Config, members: NDArray[np.int64], step: int) -> dict[int, tuple[int, ...]]:
    """For each row of the step, the orders it is shown in; independent of micro-batches and processes."""
    if config.train.swap == "random":
        coins = np.random.default_rng((config.seed, step)).integers(0, 2, len(members))
        return {row: (int(coin),) for row, coin in zip(members.tolist(), coins, strict=True)}
    return dict.fromkeys(members.tolist(), (AB, BA) if config.train.swap == "both" else (AB,))


def row_losses(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """`(R, C)` logits and soft targets -> `(R,)` cross-entropies in nats (their sum over labels, if several may hold).

    Written out, because libraries turn float labels into another loss without saying so.
    """
    if task.multi_label:
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def _checkpoint_gradients(classifier: Classifier) -> None:
    backbone: Any = classifier.backbone
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.enable_input_require_grads()


def parameter_groups(classifier: Classifier, config: Config) -> list[dict[str, Any]]:
    """AdamW's groups: the head with its own rate, and no decay on it, on norms and on biases.

    The key is `lr`: torch ignores a group's `learning_rate` without a word.
    """
    train = config.train
    trained = [(name, one) for name, one in classifier.backbone.named_parameters() if one.requires_grad]
    decayed = [one for _, one in trained if one.ndim > 1]
    spared = [one for _, one in trained if one.ndim <= 1]
    head_rate = train.head_learning_rate or train.learning_rate
    groups = [
        {"params": decayed, "lr": train.learning_rate, "weight_decay": train.weight_decay},
        {"params": spared, "lr": train.learning_rate, "weight_decay": 0.0},
        {"params": list(classifier.head.parameters()), "lr": head_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole training: by epochs, or `max_steps` if that is fewer."""
    per_epoch = math.ceil(rows / config.train.rows_per_step)
    steps = max(1, round(per_epoch * config.train.epochs))
    return min(steps, config.train.max_steps or steps)


def rate_factor(train: Train, step: int, steps: int) -> float:
    """What the peak rates are multiplied by at `step` (from 0) of `steps`: warm-up from 0, then the schedule to 0."""
    warmup = math.ceil(train.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (steps - step) / max(1, steps - warmup)
    return {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}[train.schedule]


def _plan(config: Config, rows: int, steps: int) -> Iterator[NDArray[np.int64]]:
    """`steps` steps of random rows, epoch after epoch."""
    epochs = (random_steps(rows, config.train.rows_per_step, seed=config.seed, epoch=epoch) for epoch in count())
    return islice(chain.from_iterable(epochs), steps)


def _print_derivation(
    config: Config, accelerator: Accelerator, classifier: Classifier, *, rows: int, steps: int
) -> None:
    """What was derived from what, before hours are spent on it."""
    settings, processes = config.train, accelerator.num_processes
    _, why = pick_dtype(config.model.dtype, accelerator.device)
    trained = sum(one.numel() for one in classifier.parameters() if one.requires_grad)
    orders = 2 if settings.swap == "both" else 1
    batches = math.ceil(settings.rows_per_step / settings.rows_per_batch)
    console.print(
        f"{config.model.base} {config.model.quantization}, {classifier.dtype} ({why}), {accelerator.device}; "
        f"{trained:,} trained parameters\n"
        f"{rows:,} rows x {settings.epochs:g} epochs / {settings.rows_per_step} rows a step = {steps:,} steps; "
        f"a step = {batches} batches of {settings.rows_per_batch} rows x {orders} orders over {processes} process(es)"
    )


class _Log:
    """`metrics.jsonl`: a line every so many steps, with means since the last one; `loss` is the last mean."""

    def __init__(self, path: Path, *, every: int, enabled: bool) -> None:
        self._path = path
        self._every = every
        self._enabled = enabled
        self._lines: list[str] = []
        self._since: list[float] = []
        self._tokens = 0
        self._start = time.perf_counter()
        self.loss = math.nan

    def add(self, step: int, *, loss: float, tokens: int, learning_rate: float, gradient_norm: Any) -> None:
        self._since.append(loss)
        self._tokens += tokens
        self.loss = sum(self._since) / len(self._since)
        if step % self._every:
            return
        line = {
            "step": step,
            "loss": self.loss,
            "learning_rate": learning_rate,
            "gradient_norm": float(gradient_norm),
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._start,
        }
        self._lines.append(json.dumps(line))
        self._since.clear()
        self.write()

    def write(self) -> None:
        if self._enabled:
            write_text(self._path, "".join(line + "\n" for line in self._lines))
