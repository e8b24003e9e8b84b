"""Monitor a training: its plan, log, trackers and resource forecast."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pairclf.approaches.finetune.checkpoints import check_disk
from pairclf.approaches.finetune.optimizers import trained_weights
from pairclf.approaches.finetune.resource_forecast import (
    ResourceForecast,
    busy,
    describe,
    describe_error,
    forecast_resources,
    memory_warning,
    peak_of,
    state_bytes,
    training_operations,
)
from pairclf.approaches.finetune.step import Examples, StepResult, TrainState
from pairclf.approaches.protocol import MEMORY_GB
from pairclf.config import Config, Train
from pairclf.config.dump import flat_settings
from pairclf.console import console, counted
from pairclf.errors import ConfigError
from pairclf.files import open_to_append
from pairclf.model.backbone import pick_dtype
from pairclf.model.cost import Cost
from pairclf.model.device_memory import peak_memory
from pairclf.model.engine import Classifier


class TrainingLog:
    """`metrics.jsonl`: a line every `every` steps with means and sums since the last line, and a line per evaluation.

    The lines also go to the trackers. Unwritten sums are part of a checkpoint (`state`, `begin`), so that a resumed
    training writes the same log as an uninterrupted one, except for times. Lines are appended; use `tail -f`.

    Args:
        path: the file.
        every: optimizer steps between two lines.
        accelerator: its main process writes.
        cost: of the model, for MFU: operations for real tokens / peak operations of the devices.
    """

    def __init__(self, path: Path, every: int, accelerator: Accelerator, cost: Cost) -> None:
        self._path = path
        self._every = every
        self._accelerator = accelerator
        self._cost = cost
        peak = peak_of(accelerator.device)
        self._peak = peak * accelerator.num_processes if peak else None
        self._since: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._tick = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.note = ""

    def start(self) -> None:
        """Start timing a step: evaluations and checkpoints before it are not counted."""
        self._tick = time.perf_counter()

    def add(self, step: int, result: StepResult, lengths: Sequence[int], **values: float) -> None:
        """Add an optimizer step.

        Args:
            step: its number, from 1.
            result: its loss and tokens; a loss that is not finite is excluded from the mean.
            lengths: tokens of its sequences.
            values: shown with their current values.
        """
        now = time.perf_counter()
        finite = math.isfinite(result.loss)
        sums = {
            "losses": result.loss if finite else 0.0,
            "finite": float(finite),
            "tokens": result.tokens,
            "computed": result.computed,
            "operations": training_operations(self._cost, lengths, recompute=False),
            "seconds": now - self._tick,
        }
        self._since = {name: self._since.get(name, 0.0) + value for name, value in sums.items()}
        self.tokens += round(result.tokens)
        self.seconds += sums["seconds"]
        self._last = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.note = self._in_words(self._line())
        if step % self._every == 0:
            self.close(step)

    def _line(self) -> dict[str, Any]:
        since = self._since
        return {
            "loss": since["losses"] / since["finite"] if since["finite"] else None,
            **self._last,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": since["tokens"] / since["seconds"],
            "padding": 1 - since["tokens"] / since["computed"],
            MEMORY_GB: peak_memory(self._accelerator.device) / 1e9,
            "mfu": since["operations"] / since["seconds"] / self._peak if self._peak else None,
        }

    def _in_words(self, line: dict[str, Any]) -> str:
        words = ["loss not finite" if line["loss"] is None else f"loss {line['loss']:.4f}"]
        words += [f"{line['tokens_per_second']:,.0f} tokens/s"]
        words += [f"padding {line['padding']:.0%}"] if line["padding"] > 0.0005 else []
        words += [f"{line[MEMORY_GB]:.1f} GB"]
        words += [f"MFU {line['mfu']:.0%}"] if line["mfu"] else []
        words += [f"{line['skipped']} skipped"] if line["skipped"] else []
        return ", ".join(words)

    def close(self, step: int) -> None:
        """Write the line for the steps since the last line, if there are any."""
        if self._since:
            self.write({"step": step, **self._line()})
            self._since = {}

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, and send it to the trackers."""
        if self._accelerator.is_main_process:
            with open_to_append(self._path) as stream:
                stream.write(f"{json.dumps(line)}\n".encode())
        metrics = {name: value for name, value in line.items() if value is not None and name != "step"}
        self._accelerator.log(metrics, step=line["step"])

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        size = self._path.stat().st_size if self._path.exists() else 0
        return {"bytes": size, "since": self._since, "last": self._last, "tokens": self.tokens, "seconds": self.seconds}

    def begin(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint's state, or start with `{}`; lines written after the checkpoint are dropped."""
        self._since, self._last = dict(state.get("since", {})), dict(state.get("last", {}))
        self.tokens, self.seconds = state.get("tokens", 0), state.get("seconds", 0.0)
        if self._accelerator.is_main_process:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_to_append(self._path) as stream:
                stream.truncate(min(state.get("bytes", 0), self._path.stat().st_size))


@dataclass(frozen=True, slots=True)
class TrainingEstimate:
    """Expected resources of a training: memory and time, number of trained parameters, bytes on disk."""

    forecast: ResourceForecast
    trained: int
    disk: int


def estimate_resources(
    config: Config, classifier: Classifier, examples: Examples, steps: int, processes: int
) -> TrainingEstimate:
    """Estimate a training; call it before an engine shards the weights."""
    settings, weights = config.train, trained_weights(classifier)
    epoch = math.ceil(len(examples.ids) / settings.global_batch_size)
    trained = sum(weight.numel() for weight in weights.values())
    stored = settings.optim.removeprefix("paged_")  # on disk, paged states need the same space
    size = trained * (4 + 4 * bool(settings.ema_decay)) + sum(
        state_bytes(stored, weight) for weight in weights.values()
    )
    copies = settings.save_total_limit + 2 if settings.save_steps else 1  # one more for a signal, one while writing
    bests = copies + 1 if settings.keep_weights == "best" else 0
    return TrainingEstimate(
        forecast_resources(
            config,
            classifier,
            examples.lengths,
            rows_seen=len(examples.ids) * steps / epoch,
            device=classifier.device,
            processes=processes,
        ),
        trained,
        math.ceil(copies * size + 4 * trained * (bests + 1)),  # + 1: the bundle
    )


def print_plan(state: TrainState, steps: int, estimate: TrainingEstimate, folder: Path) -> None:
    """Print the derived settings and the estimate before training, and check the disk.

    Raises:
        CheckpointError: the disk is too small.
    """
    config, rows, processes = state.config, len(state.examples.ids), state.accelerator.num_processes
    settings, cut = config.train, state.examples.cut
    _, why = pick_dtype(config.model.dtype, state.accelerator.device)
    check_disk(folder, estimate.disk)
    limit = f" or {settings.tokens_per_batch:,} tokens" if settings.tokens_per_batch else ""
    most = f", train.max_steps={settings.max_steps}" if settings.max_steps else ""
    different = sorted(set(state.peaks))
    # One for each layer under `train.layer_decay`: the ends say enough.
    shown = dict.fromkeys(state.peaks) if settings.layer_decay == 1 else [different[0], "...", different[-1]]
    peaks = ", ".join(peak if isinstance(peak, str) else f"{peak:g}" for peak in shown)
    rows_a_step = counted(settings.global_batch_size, "row")
    epochs = "epoch" if settings.num_train_epochs == 1 else "epochs"
    orders = f" x {counted(settings.orders, 'order')}" if config.task.swappable else ""
    console.print(
        f"{config.model.base} {config.model.quantization}, {state.classifier.dtype} ({why}), "
        f"{state.accelerator.device}; {estimate.trained:,} trained parameters, {settings.optim}\n"
        f"{counted(cut, 'row is', 'rows are')} cut to inputs.max_length={config.inputs.max_length} ({cut / rows:.0%})\n"
        f"{counted(rows, 'row')} x {settings.num_train_epochs:g} {epochs} / {rows_a_step} a step{most} = "
        f"{counted(steps, 'step')}; a step = up to {rows_a_step}{orders}, "
        f"{settings.layout} in batches of up to {counted(settings.per_device_train_batch_size, 'row')}{limit}, over "
        f"{counted(processes, 'process', 'processes')}\n"
        f"rates rise for {counted(math.ceil(settings.warmup_ratio * steps), 'step')} to {peaks} "
        f"({settings.lr_scheduler_type}); "
        f"checkpoints {_when(settings)}: {estimate.disk / 1e9:.2f} GB of disk with the bundle\n"
        + describe(estimate.forecast)
    )
    for warning in (memory_warning(estimate.forecast, config), busy(estimate.forecast)):
        if warning is not None:
            console.print(warning, style="yellow")


def check_hours(limit: float | None, estimate: TrainingEstimate, share_left: float) -> None:
    """Refuse a training that would take longer than `train.max_hours`, by the share of its steps that is left.

    Raises:
        ConfigError: it would.
    """
    hours = estimate.forecast.seconds * share_left / 3600
    if limit is not None and hours > limit:
        raise ConfigError(
            f"the fit check expects {hours:.3g} hours for this training, and train.max_hours={limit:.3g}",
            where="train.max_hours",
            remedy="train fewer steps or rows, or allow more hours",
        )


def report_forecast_error(estimate: TrainingEstimate, share_done: float, seconds: float, device: torch.device) -> None:
    """Compare the forecast with the measured resources, for the share of the training that was done in this run."""
    if share_done:
        forecast = replace(estimate.forecast, seconds=estimate.forecast.seconds * share_done)
        console.print(describe_error(forecast, peak_memory(device), seconds))


def _when(settings: Train) -> str:
    return f"every {settings.save_steps} steps, {settings.save_total_limit} kept" if settings.save_steps else "off"


PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
PACKAGES |= {"trackio": ("trackio",)}


def check_trackers(config: Config) -> None:
    """Check that all `train.report_to` are installed; Accelerate would silently skip the others.

    Raises:
        ConfigError: a tracker is not installed.
    """
    for name in config.train.report_to:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(f"train.report_to names {name}, which is not installed", remedy=f"pip install {name}")


def start_trackers(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Start a run in each of `train.report_to`, with the config as parameters and files in the run's folder."""
    names = config.train.report_to
    if not names:
        return
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = list(names)
    plain = {key: _plain(value) for key, value in flat_settings(config).items()}
    run = "-".join(folder.parts[-2:])
    options = {"wandb": {"name": run, "dir": str(folder)}, "mlflow": {"run_name": run}, "trackio": {"name": run}}
    accelerator.init_trackers("pairclf", plain, {name: options[name] for name in names if name in options})


def _plain(value: Any) -> str | int | float | bool:
    """A setting as TensorBoard and MLflow accept it; MLflow limits parameters to 500 characters."""
    return value if isinstance(value, bool | int | float) else str(value)[:500]
