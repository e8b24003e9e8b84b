"""A process that scores: it loads one model, answers for every piece of work, and ends with its parent."""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging as transformers_logging

from pairclf.config import override
from pairclf.errors import PairclfError
from pairclf.inference import vllm
from pairclf.inference.memory import Largest, fitting_budget, footprint
from pairclf.inference.work import Clock, Failed, Floats, Ready, Scored, Work
from pairclf.jobs.scoring import Scorer, keep_freed_memory
from pairclf.model.batch import Item
from pairclf.model.bundle import Bundle, open_bundle
from pairclf.trust import Trust, grant


class Scores(Protocol):
    """What a model does for a worker (`scoring.Scorer`)."""

    def launch(self, items: Sequence[Item]) -> Any:
        """Start on a batch; a GPU is not done when it returns."""

    def collect(self, items: Sequence[Item], launched: Any) -> tuple[Floats, int]:
        """Logits `(R, C)` of what was launched, and how many of them had to be rescued."""


IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a terminal sends to all: what becomes of them is for the parent to say, which ends us by SIGKILL."""


class Assignment(NamedTuple):
    """What a worker is to load.

    Attributes:
        bundle: its folder, whose hashes the parent has compared.
        base: folder of the base model, or None.
        overrides: `key=value`.
        devices: one, or those that the layers are laid over.
        threads: for the CPU's part; 0: as the environment says.
        largest: the largest forward pass that it will be asked for.
        beside: workers, it included, that share this machine's memory.
        trust: what the person at the command permits.
    """

    bundle: Path
    base: Path | None
    overrides: tuple[str, ...]
    devices: tuple[str, ...]
    threads: int
    largest: Largest
    beside: int
    trust: Trust = Trust()


class Loaded(NamedTuple):
    """A model that can score.

    Attributes:
        scorer: from sequences to logits.
        layout: how it lays out a batch.
        what: device, layout and why, for people.
        budget: tokens of a forward pass that the memory suffices for, where it is less than was asked for.
    """

    scorer: Scores
    layout: str
    what: str
    budget: int | None = None


Loader = Callable[[Assignment], Loaded]


def load_bundle(assignment: Assignment) -> Loaded:
    """The bundle's model on the device, or the devices, with its scorer.

    Raises:
        BundleError, ModelError: as `Bundle.load`.
    """
    opened = open_bundle(assignment.bundle, proven=True)
    config = override(opened.config, assignment.overrides)
    devices = [torch.device(one) for one in assignment.devices]
    if config.predict.backend == "vllm":
        served = vllm.Scorer(Bundle(opened.folder, opened.manifest, config), devices)
        return Loaded(served, served.layout, f"{_name(devices[0])}, {served.why}")
    if devices[0].type == "cuda":  # pinned memory and peft go to the current device, which would else be the first
        torch.cuda.set_device(devices[0])
    classifier = Bundle(opened.folder, opened.manifest, config).load(devices[0], assignment.base, others=devices[1:])
    if devices[0].type == "cpu":
        keep_freed_memory()
    scorer = Scorer(classifier, config.predict.layout)
    names = " + ".join(_name(device) for device in devices)
    dtype = str(classifier.dtype).removeprefix("torch.")
    memory, budget = ("", None) if devices[1:] else _memory(scorer, assignment)
    return Loaded(scorer, scorer.layout, f"{names}, {dtype}; {scorer.why}{memory}", budget)


def _memory(scorer: Scorer, assignment: Assignment) -> tuple[str, int | None]:
    """What the largest pass will take, for people, and the budget that fits where that one does not."""
    try:
        expected = footprint(scorer, assignment.largest, processes=assignment.beside)
        if expected.fits:
            return f"; memory {expected}", None
        fitting = fitting_budget(scorer, assignment.largest, processes=assignment.beside)
    except Exception as error:  # noqa: BLE001
        # Memory may run out in the short pass that it begins with, and it leans on torch's inner workings, which change
        # from version to version: without a forecast the passes themselves will tell, and a model is not lost.
        return f"; memory is not foretold ({type(error).__name__}: {error})", None
    return f"; memory {expected}: passes of {fitting:,} tokens", fitting


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def main(number: int, channel: Connection, load: Loader, clock: Clock) -> None:
    """A worker's life: an assignment, then work until the parent ends it or is gone.

    Args:
        number: that it signs with.
        channel: an `Assignment` and then `(Work, items)` come in; `Ready`, `Scored` and `Failed` go out.
        load: what an assignment becomes.
        clock: by which passes are timed.
    """
    for one in IGNORED:
        signal.signal(one, signal.SIG_IGN)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    desk = _Desk(number, channel, clock)
    Thread(target=desk.listen, daemon=True).start()
    assignment = desk.assignments.get()
    grant(assignment.trust)
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    began = clock()
    try:
        loaded = load(assignment)
    except Exception as error:  # noqa: BLE001 - the parent says what it was
        channel.send(_failed(number, None, error))
        return
    channel.send(Ready(number, clock() - began, loaded.layout, loaded.what, loaded.budget))
    desk.serve(loaded.scorer, assignment.devices)


def under_way(devices: Sequence[str]) -> int:
    """Batches that a worker has begun at once.

    A GPU takes the next one while it computes, so that it never waits; and where the layers lie over two GPUs, each is
    at another batch. What a CPU begins it has done before it can take another.
    """
    return 2 if devices[0].startswith("cuda") else 1


class _Begun(NamedTuple):
    """A batch under way, since when, and what collects it."""

    work: Work
    items: Sequence[Item]
    launched: Any
    since: float


class _Desk:
    """Where work comes in and results go out."""

    def __init__(self, number: int, channel: Connection, clock: Clock = time.monotonic) -> None:
        self.number = number
        self.channel = channel
        self._clock = clock
        self.assignments: SimpleQueue[Assignment] = SimpleQueue()
        self.work: SimpleQueue[tuple[Work, Sequence[Item]]] = SimpleQueue()
        self._last = 0.0  # when a batch came back

    def listen(self) -> None:
        """Take what comes as it comes, so that the parent never waits to be heard; end when the parent is gone."""
        try:
            self.assignments.put(self.channel.recv())
            while True:
                self.work.put(self.channel.recv())
        finally:
            os._exit(1)  # whatever the other threads are at: nobody is left who would want it

    def serve(self, scorer: Scores, devices: Sequence[str]) -> None:
        """Score what comes, for ever: a batch is read once the next one is on its way, if there is one."""
        begun: deque[_Begun] = deque()
        while True:
            if not begun or (len(begun) < under_way(devices) and not self.work.empty()):
                failed = self._begin(scorer, begun)
            else:
                failed = self._finish(scorer, begun.popleft())
            if failed:  # outside of `except`, as the error's traceback holds the batch's tensors
                self._recover(failed, devices)

    def _begin(self, scorer: Scores, begun: deque[_Begun]) -> Failed | None:
        work, items = self.work.get()
        since = self._clock()
        try:
            begun.append(_Begun(work, items, scorer.launch(items), since))
        except Exception as error:  # noqa: BLE001 - the parent says what it was, and the run goes on
            return _failed(self.number, work, error)
        return None

    def _finish(self, scorer: Scores, batch: _Begun) -> Failed | None:
        try:
            logits, rescued = scorer.collect(batch.items, batch.launched)
        except Exception as error:  # noqa: BLE001 - as above
            return _failed(self.number, batch.work, error)
        # Of two under way the second one gets the time since the first came back: they add up to the run's.
        since, self._last = max(batch.since, self._last), self._clock()
        self.channel.send(Scored(self.number, batch.work, logits, rescued, self._last - since))
        return None

    def _recover(self, event: Failed, devices: Sequence[str]) -> None:
        """Free what a failed batch held, and go on; or end, if the device does not answer any more."""
        gc.collect()
        cuda = [device for device in devices if device.startswith("cuda")]
        try:
            for device in cuda:
                torch.cuda.synchronize(device)
            if cuda:
                torch.cuda.empty_cache()
        except RuntimeError as broken:  # after an assertion or a wild access on a GPU, every call fails
            self.channel.send(
                event._replace(kind="died", what=f"{event.what}; the GPU is lost to the process: {broken}")
            )
            os._exit(1)
        self.channel.send(event)


def _failed(number: int, work: Work | None, error: Exception) -> Failed:
    what = str(error) if isinstance(error, PairclfError) else f"{type(error).__name__}: {error}{_place(error)}"
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
    raised = error if isinstance(error, PairclfError) else None
    return Failed(number, work, "memory" if memory else "error", what, raised)


def _place(error: Exception) -> str:
    """Where it was raised: all that is kept of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
