"""Fine-tuning: one explicit Accelerate training loop, from rows to a classifier."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from pairclf.approaches.finetune.checkpoints import (
    CHECKPOINTS,
    BestEvaluation,
    Checkpoints,
    TrainingProgress,
    discard,
    identity_of,
)
from pairclf.approaches.finetune.distributed import gathered_weights, mode_of, prepare_model, shards
from pairclf.approaches.finetune.monitor import (
    TrainingLog,
    check_hours,
    estimate_resources,
    print_plan,
    report_forecast_error,
    start_trackers,
)
from pairclf.approaches.finetune.optimizers import (
    MovingAverage,
    copy_weights,
    make_optimizer,
    rate_factor,
    set_rates,
    trained_weights,
)
from pairclf.approaches.finetune.step import (
    Examples,
    HeldOut,
    RowIndices,
    TrainState,
    accumulate_with_oom_retry,
    optimizer_step,
)
from pairclf.approaches.protocol import KEPT_STEP, LABEL_MASS
from pairclf.config import Config, dump_config
from pairclf.console import console, counted
from pairclf.console import progress as show_progress
from pairclf.errors import CheckpointError, ConfigError, ModelError, StopError
from pairclf.files import write_text
from pairclf.inputs.plan import random_steps
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.cost import cost_of_model
from pairclf.model.device_memory import forget_peak
from pairclf.model.engine import Classifier, build
from pairclf.model.scoring import by_order, items_of, score
from pairclf.model.vocabulary import label_mass, vocabulary_loss
from pairclf.scores.figures import METRICS, measure, title
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import mean_of_orders
from pairclf.signals import Signals, signals


@dataclass(slots=True)
class _Training:
    """One training and everything that it writes to."""

    state: TrainState
    progress: TrainingProgress
    checkpoints: Checkpoints
    log: TrainingLog
    held_out: HeldOut | None
    steps: int
    """Optimizer steps of the whole training."""


class Trained(NamedTuple):
    """A trained classifier, and the record of its training as in `protocol.Fitted`."""

    classifier: Classifier
    record: dict[str, float]


def train(
    config: Config,
    examples: Examples,
    folder: Path,
    accelerator: Accelerator,
    *,
    held_out: HeldOut | None = None,
    resume: bool | None = None,
    trust_checkpoint: bool = False,
) -> Trained:
    """Fine-tune on `examples`; writes `config.yaml`, `metrics.jsonl` and `checkpoints/` into `folder`.

    Args:
        config: the resolved config.
        examples: training rows, as `make_examples` returns them.
        folder: run folder of this training.
        accelerator: as `distributed.make_accelerator` returns it; one process or many.
        held_out: rows for `train.eval_steps`.
        resume: True: resume from the newest checkpoint, if there is one; False: delete checkpoints and start over;
            None: start, but fail if there are checkpoints.
        trust_checkpoint: load an engine's checkpoint that another user wrote: its pickles can run any code.

    Raises:
        ConfigError: it would take longer than `train.max_hours`.
        ModelError: the base can't be loaded; the training diverged; a row does not fit into memory.
        CheckpointError: checkpoints can't be written, or belong to another training.
        StopError: a signal arrived; a checkpoint was written.
    """
    steps = total_steps(config, len(examples.ids))
    classifier = build(config, accelerator.device)
    if not steps:
        if accelerator.is_main_process:
            write_text(folder / "config.yaml", dump_config(config))
        return Trained(classifier.eval(), {"steps": 0.0, "seconds": 0.0})
    estimate, mass = None, None
    if accelerator.is_main_process:
        estimate = estimate_resources(config, classifier, examples, steps, accelerator.num_processes)
        mass = label_mass(config, classifier, examples.encoded)
    forget_peak(accelerator.device)
    state = construct(config, examples, classifier, accelerator)
    identity = identity_of(config, examples, held_out)
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.train.save_total_limit, identity, trusted=trust_checkpoint)
    cost = cost_of_model(classifier.backbone)
    log = TrainingLog(folder / "metrics.jsonl", config.train.logging_steps, accelerator, cost)
    progress = _start_or_resume(checkpoints, state, log, resume)
    if estimate is not None:
        print_plan(state, steps, estimate, checkpoints.folder)
        check_hours(config.train.max_hours, estimate, 1 - progress.step / steps)
        write_text(folder / "config.yaml", dump_config(config))
    start_trackers(config, folder, accelerator)
    if mass is not None and not progress.step:
        log.write({"step": 0, LABEL_MASS: mass})

    first_step, seconds_before = progress.step, log.seconds
    training = _Training(state, progress, checkpoints, log, held_out, steps)
    with vocabulary_loss(config, classifier):
        _run_steps(training, f"train {folder.name}")

    log.close(progress.step)
    if estimate is not None:
        share_done = (progress.step - first_step) / steps
        report_forecast_error(estimate, share_done, log.seconds - seconds_before, accelerator.device)
    for tracker in accelerator.trackers:
        tracker.finish()  # not `end_training`: it would end the process group, which the next fold needs
    record = {"steps": float(progress.step), "seconds": log.seconds}
    if (best := progress.best) is not None and config.train.keep_weights == "best":
        record[KEPT_STEP] = float(best.step)
        if accelerator.is_main_process:
            console.print(
                f"kept the weights of step {best.step:,} of {progress.step:,}, which had the best "
                f"{title(config.train.metric_for_best_model, config.task)} of the evaluations: {best.score:.4f}"
            )
    _load_selected_weights(state, checkpoints, progress)
    return Trained(_gather_model(state).eval(), record)


def _run_steps(training: _Training, name: str) -> None:
    """Run the remaining optimizer steps, with logging, evaluations and checkpoints.

    Raises:
        StopError: a signal arrived; a checkpoint was written.
    """
    state, progress, log, steps = training.state, training.progress, training.log, training.steps
    settings, examples = state.config.train, state.examples
    evaluation_interval, checkpoint_interval = settings.eval_steps or steps, settings.save_steps or steps
    patience, budget = settings.early_stopping_patience or math.inf, settings.tokens_per_batch
    state.model.train()
    visible = state.accelerator.is_main_process
    with signals() as caught, show_progress(name, steps, done=progress.step, visible=visible) as advance:
        for step, row_indices in _remaining_steps(state.config, len(examples.ids), steps, progress):
            log.start()
            set_rates(state.optimizer, state.peaks, rate_factor(settings, step - 1, steps))
            result, budget = accumulate_with_oom_retry(state, row_indices, step, budget, stop_requested=caught.asked)
            norm = _optimizer_step(state, result.loss, progress, row_indices)
            lengths = [examples.lengths[row] for row in row_indices] * settings.orders
            log.add(step, result, lengths, gradient_norm=norm, learning_rate=state.rate, skipped=progress.skipped)
            is_last = step == steps
            if training.held_out and settings.eval_steps and (is_last or step % evaluation_interval == 0):
                _evaluate(state, training.held_out, training.checkpoints, progress, log)
            progress.is_finished = is_last or progress.evaluations_since_best >= patience
            due = bool(settings.save_steps) and (progress.is_finished or step % checkpoint_interval == 0)
            if due or result.stop_requested:
                progress.log = log.state()
                training.checkpoints.save(progress, state, due=due)
            advance(note=log.note)
            if result.stop_requested:
                raise _stop_error(caught, step, steps)
            if progress.is_finished:
                break


def construct(config: Config, examples: Examples, classifier: Classifier, accelerator: Accelerator) -> TrainState:
    """Build the training state for this launch: optimizer, engine, moving average.

    Without an engine the model is not wrapped: `step.accumulate` reduces the gradients itself, after all processes have
    agreed that none of them ran out of memory.
    """
    if config.train.gradient_checkpointing:
        checkpoint_gradients(classifier.backbone)
    weights, engine = trained_weights(classifier), shards(accelerator)
    optimizer: Any = make_optimizer(classifier, config.train)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    model, optimizer = prepare_model(accelerator, classifier, optimizer)
    if not engine:
        for weight in weights.values():
            broadcast(weight.data)  # equal initial weights, even if the processes' random numbers differ
    average = MovingAverage(weights, config.train.ema_decay) if config.train.ema_decay is not None else None
    return TrainState(config, examples, accelerator, classifier, model, optimizer, weights, peaks, average, engine)


def _start_or_resume(
    checkpoints: Checkpoints, state: TrainState, log: TrainingLog, resume: bool | None
) -> TrainingProgress:
    """Restore the newest checkpoint if `resume`; else start with fresh progress."""
    accelerator = state.accelerator
    if checkpoints.complete() and resume is None:
        raise CheckpointError(
            "there are checkpoints of an unfinished training",
            where=checkpoints.folder,
            remedy="resume with --resume, or start over with --no-resume, which deletes the checkpoints",
        )
    accelerator.wait_for_everyone()  # before one process deletes, all must have checked
    if not resume and accelerator.is_main_process:
        discard(checkpoints.folder)
    progress = checkpoints.restore(state) if resume else None
    log.begin(progress.log if progress else {})
    status = f"resumes after step {progress.step:,}" if progress else "has no checkpoint: training starts at step 1"
    if resume and accelerator.is_main_process:
        console.print(f"{checkpoints.folder} {status}")
    progress = progress or TrainingProgress()
    if len(set(gather_object([progress.step]))) > 1:
        raise CheckpointError(
            "the processes do not find the same checkpoints", remedy="put output on a disk that all nodes share"
        )
    return progress


def _optimizer_step(state: TrainState, loss: float, progress: TrainingProgress, row_indices: RowIndices) -> float:
    """Take an optimizer step, or count it as skipped if it is not finite; returns the gradient norm.

    Raises:
        ModelError: `train.max_skipped_steps` steps in a row were not finite.
    """
    settings = state.config.train
    progress.step += 1
    taken, norm = optimizer_step(state, settings.max_grad_norm, loss)
    if taken:
        progress.skipped_in_a_row = 0
        if state.average is not None:
            state.average.update(progress.step - progress.skipped)
        return norm
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    # An engine has already taken the step with these gradients: the weights can't be saved any more.
    if progress.skipped_in_a_row >= settings.max_skipped_steps or state.engine:
        raise ModelError(
            f"the loss of step {progress.step} is {loss} and its gradient norm is {norm}, as in "
            f"{counted(progress.skipped_in_a_row - 1, 'step')} before it: training has diverged",
            rows=[state.examples.ids[row] for row in row_indices],
            remedy="lower train.learning_rate or train.head_learning_rate, or set model.dtype=float32 (or bfloat16)",
        )
    return norm


def _evaluate(
    state: TrainState, held_out: HeldOut, checkpoints: Checkpoints, progress: TrainingProgress, log: TrainingLog
) -> None:
    """Evaluate the held-out rows with the weights that would be kept now; save the best weights."""
    settings = state.config.train
    log.close(progress.step)
    with state.average.applied() if state.average else nullcontext():
        rows, predicted = _predict_held_out(state, held_out)
        name = settings.metric_for_best_model
        figures = measure(predicted, held_out.targets[rows], state.config.task, held_out.weights[rows], [name])
        if name not in figures:
            raise ConfigError(
                f"train.metric_for_best_model={name} can't be measured: the held-out rows lack a class that it needs",
                remedy="set train.metric_for_best_model=log_loss, or evaluate more rows: train.eval_rows=null",
            )
        score = figures[name]
        if progress.best is None or METRICS[name].is_better(score, progress.best.score):
            progress.best, progress.evaluations_since_best = BestEvaluation(progress.step, score), 0
            if settings.keep_weights == "best" and state.accelerator.is_main_process:
                checkpoints.save_best(progress, state.weights)
        else:
            progress.evaluations_since_best += 1
    log.write({"step": progress.step, f"held_out_{settings.metric_for_best_model}": score})


def _predict_held_out(state: TrainState, held_out: HeldOut) -> tuple[list[int], Floats]:
    """The evaluated held-out rows and their probabilities `(N, C)`; each process scores a share."""
    accelerator, config, count = state.accelerator, state.config, len(held_out.targets)
    sampled = np.random.default_rng(config.seed).permutation(count)[: config.train.eval_rows]
    mine = sorted(sampled.tolist())[accelerator.process_index :: accelerator.num_processes]
    scored: list[tuple[int, list[float]]] = []
    if mine:
        items = items_of([held_out.encoded[row] for row in mine], orders=2)
        tokens = config.predict.tokens_per_batch
        logits = score(state.classifier, items, tokens_per_batch=tokens, visible=False)
        mean = mean_of_orders(by_order(items, logits, len(mine)), config.task, config.predict.temperature)
        scored = list(zip(mine, mean.tolist(), strict=True))
    gathered = sorted(gather_object(scored))
    return [row for row, _ in gathered], np.array([predicted for _, predicted in gathered])


def _load_selected_weights(state: TrainState, checkpoints: Checkpoints, progress: TrainingProgress) -> None:
    """Load the weights to keep: the best, the mean of the last checkpoints, the moving average, or the last."""
    settings = state.config.train
    if not state.accelerator.is_main_process:
        return  # only the main process has the files, and only it continues with the model
    if settings.keep_weights == "best" and progress.best is not None:
        copy_weights(checkpoints.load_best(progress.best.step), state.weights)
    elif settings.average_checkpoints > 1:
        last = [
            checkpoints.weights_of(path) for path in checkpoints.complete(due=True)[-settings.average_checkpoints :]
        ]
        copy_weights(
            {name: torch.stack([weights[name] for weights in last]).mean(dim=0) for name in last[0]}, state.weights
        )
    elif state.average is not None:
        copy_weights(state.average.averages, state.weights)


def _gather_model(state: TrainState) -> Classifier:
    """The classifier; with sharded weights, only the main process gets the whole model."""
    accelerator, trained = state.accelerator, state.classifier
    if mode_of(accelerator) in ("zero3", "fsdp"):
        gathered = gathered_weights(accelerator, state.model)
        if accelerator.is_main_process:
            trained = build(state.config, accelerator.device)
            copy_weights(gathered, trained_weights(trained))
    accelerator.free_memory()
    return trained


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole training: by epochs, or `max_steps` if that is fewer; 0: nothing is trained."""
    per_epoch = math.ceil(rows / config.train.global_batch_size)
    steps = max(1, round(per_epoch * config.train.num_train_epochs))
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def _remaining_steps(
    config: Config, rows: int, steps: int, progress: TrainingProgress
) -> Iterator[tuple[int, RowIndices]]:
    """Number, from 1, and random rows of each remaining optimizer step."""
    epochs = (random_steps(rows, config.train.global_batch_size, seed=config.seed, epoch=epoch) for epoch in count())
    numbered = enumerate(chain.from_iterable(epochs), start=1)
    return islice(numbered, steps if progress.is_finished else progress.step, steps)


def _stop_error(caught: Signals, step: int, steps: int) -> StopError:
    number = caught.received or signal.SIGTERM  # the signal may have reached another process
    return StopError(
        f"stopped by {signal.Signals(number).name} after step {step:,} of {steps:,}; a checkpoint was written",
        signal=number,
        remedy="resume with --resume",
    )
