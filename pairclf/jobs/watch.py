"""Watching a training: its log and trackers, what was derived from what, and the signals that end it."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pairclf.config import Config, Train
from pairclf.console import console
from pairclf.dispositions import answering
from pairclf.errors import ConfigError
from pairclf.files import open_to_append
from pairclf.jobs.checkpoints import check_disk, flat_settings
from pairclf.jobs.estimate import (
    Cost,
    Forecast,
    describe,
    forecast,
    peak_memory,
    peak_of,
    state_bytes,
    training_operations,
    verdict,
    warning,
)
from pairclf.jobs.optimizers import trained_weights
from pairclf.jobs.step import Examples, Learner, Outcome
from pairclf.model.backbone import pick_dtype
from pairclf.model.engine import Classifier


class Log:
    """`metrics.jsonl`: a line every so many steps, with means and sums since the last one, and a line a look.

    The lines go to the trackers too. What stands between two lines is part of a checkpoint (`state`, `begin`), so
    that a continued training writes the log of an undisturbed one, but for the times. Lines are appended: `tail -f`.

    Args:
        path: the file.
        every: optimizer steps between two lines.
        accelerator: its main process writes.
        cost: of the model, for MFU: operations that real tokens need over what the devices could do at their peak.
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
        """A step begins: what lay between it and the last one, a look or a checkpoint, is not training."""
        self._tick = time.perf_counter()

    def add(self, step: int, outcome: Outcome, lengths: Sequence[int], **values: float) -> None:
        """One optimizer step.

        Args:
            step: its number, from 1.
            outcome: its loss and tokens; a loss that is not finite is left out of the mean.
            lengths: of its sequences.
            values: what the line shows as it is now.
        """
        now = time.perf_counter()
        finite = math.isfinite(outcome.loss)
        news = {
            "losses": outcome.loss if finite else 0.0,
            "finite": float(finite),
            "tokens": outcome.tokens,
            "computed": outcome.computed,
            "operations": training_operations(self._cost, lengths, recompute=False),
            "seconds": now - self._tick,
        }
        self._since = {name: self._since.get(name, 0.0) + value for name, value in news.items()}
        self.tokens += round(outcome.tokens)
        self.seconds += news["seconds"]
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
            "memory_gb": peak_memory(self._accelerator.device) / 1e9,
            "mfu": since["operations"] / since["seconds"] / self._peak if self._peak else None,
        }

    def _in_words(self, line: dict[str, Any]) -> str:
        words = ["loss not finite" if line["loss"] is None else f"loss {line['loss']:.4f}"]
        words += [f"{line['tokens_per_second']:,.0f} tokens/s"]
        words += [f"padding {line['padding']:.0%}"] if line["padding"] > 0.0005 else []
        words += [f"{line['memory_gb']:.1f} GB"]
        words += [f"MFU {line['mfu']:.0%}"] if line["mfu"] else []
        words += [f"{line['skipped']} skipped"] if line["skipped"] else []
        return ", ".join(words)

    def close(self, step: int) -> None:
        """Write the line of the steps since the last one, if there are any."""
        if self._since:
            self.write({"step": step, **self._line()})
            self._since = {}

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, and hand it to the trackers."""
        if self._accelerator.is_main_process:
            with open_to_append(self._path) as stream:
                stream.write(f"{json.dumps(line)}\n".encode())
        shown = {name: value for name, value in line.items() if value is not None and name != "step"}
        self._accelerator.log(shown, step=line["step"])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        size = self._path.stat().st_size if self._path.exists() else 0
        return {"bytes": size, "since": self._since, "last": self._last, "tokens": self.tokens, "seconds": self.seconds}

    def begin(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, or from nothing; lines that a former training wrote after it are dropped."""
        self._since, self._last = dict(state.get("since", {})), dict(state.get("last", {}))
        self.tokens, self.seconds = state.get("tokens", 0), state.get("seconds", 0.0)
        if self._accelerator.is_main_process:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_to_append(self._path) as stream:
                stream.truncate(min(state.get("bytes", 0), self._path.stat().st_size))


@dataclass(frozen=True, slots=True)
class Expected:
    """What a training will take: `forecast` of all its steps, weights that are trained, and bytes on the disk."""

    forecast: Forecast
    trained: int
    disk: int


def expect(config: Config, classifier: Classifier, examples: Examples, steps: int, processes: int) -> Expected:
    """Before an engine has cut the weights into shares."""
    settings, weights = config.train, trained_weights(classifier)
    epoch = math.ceil(len(examples.ids) / settings.rows_per_step)
    trained = sum(one.numel() for one in weights.values())
    kept = settings.optimizer.removeprefix("paged_")  # on disk, paged states are like others
    size = trained * (4 + 4 * bool(settings.ema)) + sum(state_bytes(kept, one) for one in weights.values())
    copies = settings.checkpoints + 2 if settings.checkpoint_every else 1  # one by a signal, one while it is written
    bests = copies + 1 if settings.keep == "best" else 0
    return Expected(
        forecast(
            config,
            classifier,
            examples.lengths,
            rows_seen=len(examples.ids) * steps / epoch,
            device=classifier.device,
            processes=processes,
        ),
        trained,
        math.ceil(copies * size + 4 * trained * (bests + 1)),  # and the bundle
    )


def announce(learner: Learner, steps: int, expected: Expected, folder: Path) -> None:
    """What was derived from what, before hours are spent on it; and that the disk suffices.

    Raises:
        CheckpointError: it does not.
    """
    config, rows, processes = learner.config, len(learner.examples.ids), learner.accelerator.num_processes
    settings = config.train
    _, why = pick_dtype(config.model.dtype, learner.accelerator.device)
    check_disk(folder, expected.disk)
    limit = f" or {settings.tokens_per_batch:,} tokens" if settings.tokens_per_batch else ""
    most = f", train.max_steps={settings.max_steps}" if settings.max_steps else ""
    peaks = ", ".join(f"{peak:g}" for peak in dict.fromkeys(learner.peaks))
    console.print(
        f"{config.model.base} {config.model.quantization}, {learner.classifier.dtype} ({why}), "
        f"{learner.accelerator.device}; {expected.trained:,} trained parameters, {settings.optimizer}\n"
        f"{rows:,} rows x {settings.epochs:g} epochs / {settings.rows_per_step} rows a step{most} = {steps:,} steps; "
        f"a step = up to {settings.rows_per_step} rows x {settings.orders} orders, {settings.layout} in batches of up "
        f"to {settings.rows_per_batch} rows{limit}, over {processes} process(es)\n"
        f"rates rise for {math.ceil(settings.warmup * steps):,} steps to {peaks} ({settings.schedule}); "
        f"checkpoints {_when(settings)}: {expected.disk / 1e9:.2f} GB of disk with the bundle\n"
        + describe(expected.forecast)
    )
    if (doubt := warning(expected.forecast, config)) is not None:
        console.print(doubt, style="yellow")


def conclude(expected: Expected, done: float, seconds: float, device: torch.device) -> None:
    """By how much the forecast was right, for the part of the training, from 0 to 1, that was done here."""
    if done:
        part = replace(expected.forecast, seconds=expected.forecast.seconds * done)
        console.print(verdict(part, peak_memory(device), seconds))


def _when(settings: Train) -> str:
    return (
        f"every {settings.checkpoint_every} steps, {settings.checkpoints} kept" if settings.checkpoint_every else "off"
    )


PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
PACKAGES |= {"trackio": ("trackio",)}


def check_trackers(config: Config) -> None:
    """Do nothing if what `train.trackers` names is installed.

    Raises:
        ConfigError: something is not; Accelerate would leave it out without a word.
    """
    for name in config.train.trackers:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(f"train.trackers names {name}, which is not installed", remedy=f"pip install {name}")


def start_trackers(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Begin a run in each of `train.trackers`, with the config as its parameters; files go into the run's folder."""
    wanted = config.train.trackers
    if not wanted:
        return
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = list(wanted)
    plain = {key: _plain(value) for key, value in flat_settings(config.model_dump(mode="json")).items()}
    run = "-".join(folder.parts[-2:])
    options = {"wandb": {"name": run, "dir": str(folder)}, "mlflow": {"run_name": run}, "trackio": {"name": run}}
    accelerator.init_trackers("pairclf", plain, {name: options[name] for name in wanted if name in options})


def _plain(value: Any) -> str | int | float | bool:
    """A setting as TensorBoard and MLflow take it; MLflow's parameters end at 500 characters."""
    return value if isinstance(value, bool | int | float) else str(value)[:500]


HASTE = 1.0
"""Seconds within which a second Ctrl-C is taken for an echo of the first."""


class Signals:
    """The first signal that asked the process to end, or None: read at the end of a step, when all is in order."""

    def __init__(self) -> None:
        self.received: int | None = None

    def asked(self) -> bool:
        return self.received is not None


@contextmanager
def signals(clock: Callable[[], float] = time.monotonic) -> Iterator[Signals]:
    """Catch SIGTERM (a queue's time limit), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) while it lasts.

    A launcher and the terminal may both send one, so that a second SIGTERM changes nothing; a second Ctrl-C, later than
    that by `clock`, interrupts at once. What the process was started to ignore, it goes on to ignore.
    """
    caught, first = Signals(), math.inf

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        if caught.received is not None and number == signal.SIGINT and clock() - first > HASTE:
            raise KeyboardInterrupt
        caught.received, first = number, min(first, clock())

    with answering((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), note):
        yield caught
