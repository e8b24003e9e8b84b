"""Fine-tuning: one visible Accelerate loop, from rows to a classifier."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from pairclf.config import Config, Train, dump_config
from pairclf.console import console, progress
from pairclf.errors import CheckpointError, ModelError, StopError
from pairclf.files import write_text
from pairclf.inputs.plan import random_steps
from pairclf.inputs.render import Encoded
from pairclf.jobs.checkpoints import CHECKPOINTS, Best, Checkpoints, State, check_disk, discard, identity_of
from pairclf.jobs.estimate import (
    Forecast,
    cost_of_model,
    describe,
    forecast,
    peak_memory,
    state_bytes,
    verdict,
    warning,
)
from pairclf.jobs.launch import gathered_weights, mode_of, prepare_model, shards
from pairclf.jobs.optimizers import (
    MovingAverage,
    copy_weights,
    make_optimizer,
    rate_factor,
    set_rates,
    trained_weights,
)
from pairclf.jobs.scoring import Floats, by_order, combine, items_of, probabilities, score
from pairclf.jobs.step import Examples, Learner, Members, apply, prepare, within_memory
from pairclf.jobs.watch import Log, Signals, signals, start_trackers
from pairclf.model.backbone import checkpoint_gradients, pick_dtype
from pairclf.model.engine import Classifier, build
from pairclf.scores.metrics import accuracy, expected_calibration_error, log_loss
from pairclf.task import Row

METRICS = {
    "log_loss": (log_loss, -1),
    "accuracy": (accuracy, 1),
    "expected_calibration_error": (expected_calibration_error, -1),
}
"""What the looks at held-out rows may go by, and whether more (1) or less (-1) of it is better."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that the training looks at and never learns from: as the model sees them, and their targets `(N, C)`."""

    encoded: Sequence[tuple[Encoded, ...]]
    targets: Floats


def train(
    config: Config,
    rows: Sequence[Row],
    encoded: Sequence[tuple[Encoded, ...]],
    folder: Path,
    accelerator: Accelerator,
    *,
    held_out: HeldOut | None = None,
    teachers: Floats | None = None,
    resume: bool | None = None,
) -> Classifier:
    """Fine-tune on `rows`; writes `config.yaml`, `metrics.jsonl` and `checkpoints/` into `folder`.

    Args:
        config: the resolved config.
        rows: labelled rows, all of which are trained on.
        encoded: the same rows as the model sees them.
        folder: run folder of this training.
        accelerator: as `launch.make_accelerator` makes it; one process or many.
        held_out: rows for `train.evaluate_every`.
        teachers: `(N, C)` probabilities from teachers, NaN where a row has none.
        resume: True: go on from the newest checkpoint, if there is one; False: delete what is there; None: refuse to
            start where a training stopped half-way.

    Raises:
        DataError: no rows, or a row without a target.
        ModelError: the base can't be loaded; the training diverged; a row does not fit the memory.
        CheckpointError: checkpoints can't be written or are of another training.
        StopError: a signal came; a checkpoint was written.
    """
    # Construct
    settings, main = config.train, accelerator.is_main_process
    examples = prepare(rows, encoded, config, teachers)
    held_out = held_out if settings.evaluate_every else None
    steps = total_steps(config, len(rows))
    classifier = build(config, accelerator.device)
    expected = _expect(config, classifier, examples, steps, accelerator.num_processes) if main else None
    learner = construct(config, classifier, accelerator)
    identity = identity_of(config, _fingerprint(examples, held_out))
    checkpoints = Checkpoints(folder / CHECKPOINTS, settings.checkpoints, identity)
    log = Log(folder / "metrics.jsonl", settings.log_every, accelerator, cost_of_model(classifier.backbone))

    # Set up
    state = _begin(checkpoints, learner, log, resume)
    if expected is not None:
        write_text(folder / "config.yaml", dump_config(config))
        _announce(config, learner, len(rows), steps, expected, checkpoints.folder)
    start_trackers(config, folder, accelerator)
    learner.model.train()

    # Train
    budget, begun, before = settings.tokens_per_batch, state.step, log.seconds
    with signals() as caught, progress(f"train {folder.name}", steps, done=begun, visible=main) as advance:
        for step, members in _plan(config, len(rows), steps, state):
            log.start()
            set_rates(learner.optimizer, learner.peaks, rate_factor(settings, step - 1, steps))
            stop = caught.received is not None
            outcome, budget = within_memory(learner, config, examples, members, step, budget, stop=stop)
            norm = _take(learner, settings, outcome.loss, state, [examples.ids[row] for row in members])
            sizes = [examples.lengths[row] for row in members] * settings.orders
            log.add(step, outcome, sizes, gradient_norm=norm, learning_rate=learner.rate, skipped=state.skipped)
            if held_out and (step % (settings.evaluate_every or steps) == 0 or step == steps):
                _look(learner, config, held_out, checkpoints, state, log)
            state.over = step == steps or state.looks_since >= (settings.patience or math.inf)
            due = state.over or step % (settings.checkpoint_every or steps) == 0
            if outcome.stopping or (due and settings.checkpoint_every):
                state.log = log.state()
                checkpoints.save(state, learner)
            advance(note=log.note)
            if state.over:
                break
            if outcome.stopping:
                raise _stopped(caught, step, steps)

    # Clean up
    log.close(state.step)
    if expected is not None and state.step > begun:
        part = expected.forecast.seconds * (state.step - begun) / steps
        took = replace(expected.forecast, seconds=part)
        console.print(verdict(took, peak_memory(accelerator.device), log.seconds - before))
    return _finish(config, learner, checkpoints, state)


def construct(config: Config, classifier: Classifier, accelerator: Accelerator) -> Learner:
    """The classifier with its optimizer, as this launch needs them.

    Without an engine the model is not wrapped: `step.accumulate` reduces the gradients itself, after all processes have
    agreed that there is something to reduce.
    """
    if config.train.gradient_checkpointing:
        checkpoint_gradients(classifier.backbone)
    weights, engine = trained_weights(classifier), shards(accelerator)
    optimizer: Any = make_optimizer(classifier, config.train)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    model, optimizer = prepare_model(accelerator, classifier, optimizer)
    if not engine:
        for one in weights.values():
            broadcast(one.data)  # the seeds are alike; this holds whatever drew from them
    average = MovingAverage(weights, config.train.ema) if config.train.ema is not None else None
    return Learner(accelerator, classifier, model, optimizer, weights, peaks, average, engine)


def _begin(checkpoints: Checkpoints, learner: Learner, log: Log, resume: bool | None) -> State:
    """The state to go on from; a fresh one, if there is none."""
    accelerator = learner.accelerator
    if checkpoints.found() and resume is None:
        raise CheckpointError(
            "a training stopped here half-way",
            where=checkpoints.folder,
            remedy="go on with --resume, or start over with --no-resume, which deletes its checkpoints",
        )
    accelerator.wait_for_everyone()  # all have looked, before one deletes
    if not resume and accelerator.is_main_process:
        discard(checkpoints.folder)
    state = checkpoints.restore(learner) if resume else None
    if state is not None:
        log.restore(state.log)
    said = f"goes on after step {state.step:,}" if state else "holds no checkpoint: starts from the beginning"
    if resume and accelerator.is_main_process:
        console.print(f"{checkpoints.folder} {said}")
    state = state or State()
    if len(set(gather_object([state.step]))) > 1:
        raise CheckpointError(
            "the processes do not find the same checkpoints", remedy="put output on a disk that all nodes share"
        )
    return state


def _take(learner: Learner, settings: Train, loss: float, state: State, ids: Sequence[str]) -> float:
    """Take the step, or count it as skipped; returns the gradient's norm.

    Raises:
        ModelError: `train.max_skipped` steps in a row were not finite.
    """
    state.step += 1
    taken, norm = apply(learner, settings.clip, loss)
    if taken:
        state.in_a_row = 0
        if learner.average is not None:
            learner.average.update(state.step - state.skipped)
        return norm
    state.skipped += 1
    state.in_a_row += 1
    if state.in_a_row >= settings.max_skipped or learner.engine:  # an engine has taken the step before it can be judged
        raise ModelError(
            f"the loss of step {state.step} is {loss} and its gradient's norm {norm}, as in "
            f"{state.in_a_row - 1} step(s) before it: training has diverged",
            rows=ids,
            remedy="lower train.learning_rate or train.head_learning_rate, or set model.dtype=float32 (or bfloat16)",
        )
    return norm


def _look(
    learner: Learner, config: Config, held_out: HeldOut, checkpoints: Checkpoints, state: State, log: Log
) -> None:
    """Score the held-out rows with the weights as they would be kept now, and remember the best."""
    settings = config.train
    metric, sign = METRICS[settings.metric]
    with learner.average.applied() if learner.average else nullcontext():
        rows, predicted = _predict(learner, config, held_out)
        score = metric(predicted, held_out.targets[rows])
        better = state.best is None or sign * (score - state.best.score) > 0
        if better and settings.keep == "best" and learner.accelerator.is_main_process:
            checkpoints.save_best(state.step, learner.weights)
    if better:
        state.best, state.looks_since = Best(state.step, score), 0
    else:
        state.looks_since += 1
    log.write({"step": state.step, f"held_out_{settings.metric}": score})


def _predict(learner: Learner, config: Config, held_out: HeldOut) -> tuple[list[int], Floats]:
    """The held-out rows that are looked at, and their probabilities `(N, C)`; every process scores a part."""
    accelerator, count = learner.accelerator, len(held_out.encoded)
    drawn = np.random.default_rng(config.seed).permutation(count)[: config.train.evaluate_rows]
    mine = sorted(drawn.tolist())[accelerator.process_index :: accelerator.num_processes]
    scored: list[tuple[int, list[float]]] = []
    if mine:
        items = items_of([held_out.encoded[row] for row in mine], orders=2)
        tokens = config.predict.tokens_per_batch
        logits = score(learner.classifier, items, tokens_per_batch=tokens, visible=False)
        orders = probabilities(by_order(items, logits, len(mine)), config.task, config.predict.temperature)
        scored = list(zip(mine, combine(orders, config.task).tolist(), strict=True))
    gathered = sorted(gather_object(scored))
    return [row for row, _ in gathered], np.array([predicted for _, predicted in gathered])


def _finish(config: Config, learner: Learner, checkpoints: Checkpoints, state: State) -> Classifier:
    """The classifier with the weights that are to be kept, in evaluation mode."""
    settings, accelerator = config.train, learner.accelerator
    main = accelerator.is_main_process  # what lies on the disk was written by it, and it alone goes on with the model
    if main and settings.keep == "best" and state.best is not None:
        copy_weights(checkpoints.load_best(state.best.step), learner.weights)
    elif main and settings.average_last > 1:
        last = [checkpoints.weights_of(path) for path in checkpoints.found()[-settings.average_last :]]
        copy_weights({name: torch.stack([one[name] for one in last]).mean(dim=0) for name in last[0]}, learner.weights)
    elif learner.average is not None:
        copy_weights(learner.average.averages, learner.weights)
    for tracker in accelerator.trackers:  # not `end_training`: it ends the process group, which engines still need
        tracker.finish()
    trained = learner.classifier
    if mode_of(accelerator) in ("zero3", "fsdp"):
        whole = gathered_weights(accelerator, learner.model)
        if accelerator.is_main_process:
            trained = build(config, accelerator.device)
            copy_weights(whole, trained_weights(trained))
    accelerator.free_memory()
    return trained.eval()


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole training: by epochs, or `max_steps` if that is fewer."""
    per_epoch = math.ceil(rows / config.train.rows_per_step)
    steps = max(1, round(per_epoch * config.train.epochs))
    return min(steps, config.train.max_steps or steps)


def _plan(config: Config, rows: int, steps: int, state: State) -> Iterator[tuple[int, Members]]:
    """Steps of random rows, numbered from 1, epoch after epoch; those that are done are passed over."""
    epochs = (random_steps(rows, config.train.rows_per_step, seed=config.seed, epoch=epoch) for epoch in count())
    numbered = enumerate(chain.from_iterable(epochs), start=1)
    return islice(numbered, steps if state.over else state.step, steps)


def _fingerprint(examples: Examples, held_out: HeldOut | None) -> str:
    """Tells the rows of one training from another's: ids, lengths, targets, weights, teachers."""
    digest = hashlib.sha256(json.dumps([examples.ids, examples.lengths]).encode())
    for one in (examples.targets, examples.weights, examples.teachers):
        digest.update(b"" if one is None else one.numpy().tobytes())
    digest.update(b"" if held_out is None else np.ascontiguousarray(held_out.targets).tobytes())
    return digest.hexdigest()


def _stopped(caught: Signals, step: int, steps: int) -> StopError:
    number = caught.received or signal.SIGTERM  # another process may have got it
    return StopError(
        f"stopped by {signal.Signals(number).name} after step {step:,} of {steps:,}, of which a checkpoint was written",
        signal=number,
        remedy="go on with --resume",
    )


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a training will take: `forecast` of all its steps, weights that are trained, and bytes on the disk."""

    forecast: Forecast
    trained: int
    disk: int


def _expect(config: Config, classifier: Classifier, examples: Examples, steps: int, processes: int) -> _Expected:
    """Before an engine has cut the weights into shares."""
    settings, weights = config.train, trained_weights(classifier)
    epoch = math.ceil(len(examples.ids) / settings.rows_per_step)
    trained = sum(one.numel() for one in weights.values())
    kept = settings.optimizer.removeprefix("paged_")  # on disk, paged states are like others
    size = trained * (4 + 4 * bool(settings.ema)) + sum(state_bytes(kept, one) for one in weights.values())
    copies = settings.checkpoints + 1 if settings.checkpoint_every else 1  # one more, while it is written
    return _Expected(
        forecast(
            config,
            classifier,
            examples.lengths,
            rows_seen=len(examples.ids) * steps / epoch,
            device=classifier.device,
            processes=processes,
        ),
        trained,
        math.ceil(copies * size + 4 * trained * (1 + 2 * (settings.keep == "best"))),  # and the bundle
    )


def _announce(config: Config, learner: Learner, rows: int, steps: int, expected: _Expected, folder: Path) -> None:
    """What was derived from what, before hours are spent on it; and that the disk suffices.

    Raises:
        CheckpointError: it does not.
    """
    settings, processes = config.train, learner.accelerator.num_processes
    _, why = pick_dtype(config.model.dtype, learner.accelerator.device)
    check_disk(folder, expected.disk)
    limit = f" or {settings.tokens_per_batch:,} tokens" if settings.tokens_per_batch else ""
    epochs = "" if settings.max_steps else f" x {settings.epochs:g} epochs / {settings.rows_per_step} rows a step"
    peaks = ", ".join(f"{peak:g}" for peak in dict.fromkeys(learner.peaks))
    console.print(
        f"{config.model.base} {config.model.quantization}, {learner.classifier.dtype} ({why}), "
        f"{learner.accelerator.device}; {expected.trained:,} trained parameters, {settings.optimizer}\n"
        f"{rows:,} rows{epochs} = {steps:,} steps; a step = {settings.rows_per_step} rows x {settings.orders} orders, "
        f"{settings.layout} in batches of up to {settings.rows_per_batch} rows{limit}, over {processes} process(es)\n"
        f"rates rise for {math.ceil(settings.warmup * steps):,} steps to {peaks} ({settings.schedule}); "
        f"checkpoints {_when(settings)}: {expected.disk / 1e9:.2f} GB of disk with the bundle\n"
        + describe(expected.forecast)
    )
    if (doubt := warning(expected.forecast, config)) is not None:
        console.print(doubt, style="yellow")


def _when(settings: Train) -> str:
    return (
        f"every {settings.checkpoint_every} steps, {settings.checkpoints} kept" if settings.checkpoint_every else "off"
    )
