"""Fine-tuning: one visible Accelerate loop, from rows to a classifier."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from pairclf.config import Config, dump_config
from pairclf.console import console, progress
from pairclf.errors import CheckpointError, ModelError, StopError
from pairclf.files import write_text
from pairclf.inputs.plan import random_steps
from pairclf.jobs.checkpoints import CHECKPOINTS, Best, Checkpoints, State, discard, identity_of
from pairclf.jobs.estimate import cost_of_model, forget_peak
from pairclf.jobs.launch import gathered_weights, mode_of, prepare_model, shards
from pairclf.jobs.optimizers import (
    MovingAverage,
    copy_weights,
    make_optimizer,
    rate_factor,
    set_rates,
    trained_weights,
)
from pairclf.jobs.scoring import Floats, by_order, items_of, score
from pairclf.jobs.step import Examples, HeldOut, Learner, Members, apply, within_memory
from pairclf.jobs.watch import Log, Signals, announce, conclude, expect, signals, start_trackers
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.engine import Classifier, build
from pairclf.scores.metrics import METRICS, measure
from pairclf.scores.probabilities import mean_of_orders


def train(
    config: Config,
    examples: Examples,
    folder: Path,
    accelerator: Accelerator,
    *,
    held_out: HeldOut | None = None,
    resume: bool | None = None,
    trust_checkpoint: bool = False,
) -> Classifier:
    """Fine-tune on `examples`; writes `config.yaml`, `metrics.jsonl` and `checkpoints/` into `folder`.

    Args:
        config: the resolved config.
        examples: the rows, as `prepare` lays them out; all of them are trained on.
        folder: run folder of this training.
        accelerator: as `launch.make_accelerator` makes it; one process or many.
        held_out: rows for `train.evaluate_every`.
        resume: True: go on from the newest checkpoint, if there is one; False: delete what is there; None: refuse to
            start where a training stopped half-way.
        trust_checkpoint: load an engine's checkpoint that this user did not write: its pickles can run any code.

    Raises:
        ModelError: the base can't be loaded; the training diverged; a row does not fit the memory.
        CheckpointError: checkpoints can't be written or are of another training.
        StopError: a signal came; a checkpoint was written.
    """
    # Construct
    settings, main, rows = config.train, accelerator.is_main_process, len(examples.ids)
    steps = total_steps(config, rows)
    classifier = build(config, accelerator.device)
    expected = expect(config, classifier, examples, steps, accelerator.num_processes) if main else None
    forget_peak(accelerator.device)
    learner = construct(config, examples, classifier, accelerator)
    identity = identity_of(config, examples, held_out)
    checkpoints = Checkpoints(folder / CHECKPOINTS, settings.checkpoints, identity, trusted=trust_checkpoint)
    log = Log(folder / "metrics.jsonl", settings.log_every, accelerator, cost_of_model(classifier.backbone))

    # Set up
    state = _begin(checkpoints, learner, log, resume)
    if expected is not None:
        announce(learner, steps, expected, checkpoints.folder)
        write_text(folder / "config.yaml", dump_config(config))
    start_trackers(config, folder, accelerator)
    learner.model.train()
    budget, begun, before = settings.tokens_per_batch, state.step, log.seconds
    look_every, save_every = settings.evaluate_every or steps, settings.checkpoint_every or steps
    patience = settings.patience or math.inf

    # Train
    with signals() as caught, progress(f"train {folder.name}", steps, done=begun, visible=main) as advance:
        for step, members in _plan(config, rows, steps, state):
            log.start()
            set_rates(learner.optimizer, learner.peaks, rate_factor(settings, step - 1, steps))
            outcome, budget = within_memory(learner, members, step, budget, asked=caught.asked)
            norm = _take(learner, outcome.loss, state, members)
            sizes = [examples.lengths[row] for row in members] * settings.orders
            log.add(step, outcome, sizes, gradient_norm=norm, learning_rate=learner.rate, skipped=state.skipped)
            last = step == steps
            if held_out and settings.evaluate_every and (last or step % look_every == 0):
                _look(learner, held_out, checkpoints, state, log)
            state.over = last or state.looks_since >= patience
            due = bool(settings.checkpoint_every) and (state.over or step % save_every == 0)
            if due or outcome.stopping:
                state.log = log.state()
                checkpoints.save(state, learner, due=due)
            advance(note=log.note)
            if outcome.stopping:
                raise _stopped(caught, step, steps)
            if state.over:
                break

    # Clean up
    log.close(state.step)
    if expected is not None:
        conclude(expected, (state.step - begun) / steps, log.seconds - before, accelerator.device)
    for tracker in accelerator.trackers:
        tracker.finish()  # `end_training` would end the processes' group too, and another fold may follow
    _keep(learner, checkpoints, state)
    return _whole(learner).eval()


def construct(config: Config, examples: Examples, classifier: Classifier, accelerator: Accelerator) -> Learner:
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
    return Learner(config, examples, accelerator, classifier, model, optimizer, weights, peaks, average, engine)


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
    log.begin(state.log if state else {})
    said = f"goes on after step {state.step:,}" if state else "holds no checkpoint: starts from the beginning"
    if resume and accelerator.is_main_process:
        console.print(f"{checkpoints.folder} {said}")
    state = state or State()
    if len(set(gather_object([state.step]))) > 1:
        raise CheckpointError(
            "the processes do not find the same checkpoints", remedy="put output on a disk that all nodes share"
        )
    return state


def _take(learner: Learner, loss: float, state: State, members: Members) -> float:
    """Take the step, or count it as skipped; returns the gradient's norm.

    Raises:
        ModelError: `train.max_skipped` steps in a row were not finite.
    """
    settings = learner.config.train
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
            rows=[learner.examples.ids[row] for row in members],
            remedy="lower train.learning_rate or train.head_learning_rate, or set model.dtype=float32 (or bfloat16)",
        )
    return norm


def _look(learner: Learner, held_out: HeldOut, checkpoints: Checkpoints, state: State, log: Log) -> None:
    """Score the held-out rows with the weights as they would be kept now, and remember the best."""
    settings = learner.config.train
    log.close(state.step)
    with learner.average.applied() if learner.average else nullcontext():
        rows, predicted = _predict(learner, held_out)
        figures = measure(predicted, held_out.targets[rows], learner.config.task, held_out.weights[rows])
        score = figures[settings.metric]
        if state.best is None or METRICS[settings.metric].better * (score - state.best.score) > 0:
            state.best, state.looks_since = Best(state.step, score), 0
            if settings.keep == "best" and learner.accelerator.is_main_process:
                checkpoints.save_best(state, learner.weights)
        else:
            state.looks_since += 1
    log.write({"step": state.step, f"held_out_{settings.metric}": score})


def _predict(learner: Learner, held_out: HeldOut) -> tuple[list[int], Floats]:
    """The held-out rows that are looked at, and their probabilities `(N, C)`; every process scores a part."""
    accelerator, config, count = learner.accelerator, learner.config, len(held_out.targets)
    drawn = np.random.default_rng(config.seed).permutation(count)[: config.train.evaluate_rows]
    mine = sorted(drawn.tolist())[accelerator.process_index :: accelerator.num_processes]
    scored: list[tuple[int, list[float]]] = []
    if mine:
        items = items_of([held_out.encoded[row] for row in mine], orders=2)
        tokens = config.predict.tokens_per_batch
        logits = score(learner.classifier, items, tokens_per_batch=tokens, visible=False)
        mean = mean_of_orders(by_order(items, logits, len(mine)), config.task, config.predict.temperature)
        scored = list(zip(mine, mean.tolist(), strict=True))
    gathered = sorted(gather_object(scored))
    return [row for row, _ in gathered], np.array([predicted for _, predicted in gathered])


def _keep(learner: Learner, checkpoints: Checkpoints, state: State) -> None:
    """Give the model the weights to keep: the best, the mean of the last, the moving average, or its own."""
    settings = learner.config.train
    if not learner.accelerator.is_main_process:
        return  # what lies on the disk was written by the main process, which alone goes on with the model
    if settings.keep == "best" and state.best is not None:
        copy_weights(checkpoints.load_best(state.best.step), learner.weights)
    elif settings.average_last > 1:
        last = [checkpoints.weights_of(path) for path in checkpoints.found(due=True)[-settings.average_last :]]
        copy_weights({name: torch.stack([one[name] for one in last]).mean(dim=0) for name in last[0]}, learner.weights)
    elif learner.average is not None:
        copy_weights(learner.average.averages, learner.weights)


def _whole(learner: Learner) -> Classifier:
    """The classifier; the main process has it whole, where the weights were shared out."""
    accelerator, trained = learner.accelerator, learner.classifier
    if mode_of(accelerator) in ("zero3", "fsdp"):
        gathered = gathered_weights(accelerator, learner.model)
        if accelerator.is_main_process:
            trained = build(learner.config, accelerator.device)
            copy_weights(gathered, trained_weights(trained))
    accelerator.free_memory()
    return trained


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


def _stopped(caught: Signals, step: int, steps: int) -> StopError:
    number = caught.received or signal.SIGTERM  # another process may have got it
    return StopError(
        f"stopped by {signal.Signals(number).name} after step {step:,} of {steps:,}; a checkpoint was written",
        signal=number,
        remedy="go on with --resume",
    )
