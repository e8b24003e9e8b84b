"""Watching a training: its log and trackers, what was derived from what, and the signals that end it."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pairclf.config import Config
from pairclf.errors import ConfigError
from pairclf.files import write_text
from pairclf.jobs.checkpoints import flat_settings
from pairclf.jobs.estimate import Cost, peak_memory, peak_of, training_operations
from pairclf.jobs.step import Outcome


class Log:
    """`metrics.jsonl`: a line every so many steps, with means and sums since the last one, and a line a look.

    The lines go to the trackers too. What stands between two lines is part of a checkpoint (`state`, `restore`), so
    that a continued training writes the log of an undisturbed one, but for the times.

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
        self._lines: list[dict[str, Any]] = []
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
        self._lines.append(line)
        if self._accelerator.is_main_process:
            write_text(self._path, "".join(json.dumps(one) + "\n" for one in self._lines))
        shown = {name: value for name, value in line.items() if value is not None and name != "step"}
        self._accelerator.log(shown, step=line["step"])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"lines": self._lines, "since": self._since, "tokens": self.tokens, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; lines that a killed training wrote after it are dropped."""
        self._lines, self._since = list(state["lines"]), dict(state["since"])
        self.tokens, self.seconds = state["tokens"], state["seconds"]


PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
PACKAGES |= {"trackio": ("trackio",)}


def start_trackers(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Begin a run in each of `train.trackers`, with the config as its parameters; files go into the run's folder.

    Raises:
        ConfigError: a tracker's package is not installed (Accelerate would leave it out without a word).
    """
    wanted = config.train.trackers
    for name in wanted:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(f"train.trackers={wanted} needs {name}", remedy=f"pip install {PACKAGES[name][0]}")
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


@contextmanager
def signals() -> Iterator[Signals]:
    """Catch SIGTERM (a queue's time limit, a notebook's stop) and SIGINT (Ctrl-C) while it lasts.

    A launcher and the terminal may both send one, so that a second SIGTERM changes nothing; a second Ctrl-C, later than
    that, interrupts at once.
    """
    caught, first = Signals(), math.inf

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        if caught.received is not None and number == signal.SIGINT and time.monotonic() - first > HASTE:
            raise KeyboardInterrupt
        caught.received, first = number, min(first, time.monotonic())

    former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
