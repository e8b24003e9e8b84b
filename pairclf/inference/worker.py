"""A worker process: it loads one model, runs jobs and ends with its parent."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from pairclf.approaches import approach_of
from pairclf.approaches.protocol import Assignment, Loaded, Loader, Scorer
from pairclf.bundles.bundle import open_bundle
from pairclf.config import override
from pairclf.errors import PairclfError
from pairclf.inference.messages import BatchScored, Clock, Job, WorkerFailure, WorkerReady
from pairclf.inputs.sequences import Item
from pairclf.signals import leave_to_parent
from pairclf.trust import grant


def load_bundle(assignment: Assignment) -> Loaded:
    """Load a bundle's model on its device, or devices.

    Raises:
        BundleError, ModelError: as its approach's `load`.
    """
    opened = open_bundle(assignment.bundle, verified=True)
    config = override(opened.config, assignment.overrides)
    bundle = replace(opened, config=config.pointwise() if assignment.pointwise else config)
    return approach_of(bundle.config).load(bundle, assignment)


def main(number: int, channel: Connection, load: Loader, clock: Clock) -> None:
    """Run a worker: it receives an assignment, then jobs, until its parent ends.

    Args:
        number: the worker's number, in all its messages.
        channel: receives an `Assignment`, then `(Job, items)`; sends `WorkerReady`, `BatchScored`, `WorkerFailure`.
        load: loads the assigned model.
        clock: measures passes.
    """
    leave_to_parent()
    desk = _JobServer(number, channel, clock)
    Thread(target=desk.listen, daemon=True).start()
    assignment = desk.assignments.get()
    grant(assignment.trust)
    began = clock()
    try:
        loaded = load(assignment)
    except Exception as error:  # noqa: BLE001 - reported to the parent
        channel.send(_failure_of(number, None, error))
        return
    channel.send(WorkerReady(number, clock() - began, loaded.layout, loaded.what, loaded.budget))
    desk.serve(loaded.scorer, assignment.devices)


def max_in_flight(devices: Sequence[str]) -> int:
    """Batches that a worker runs at once.

    A GPU is given the next batch while it computes, so that it never idles; if the layers are split over two GPUs, each
    computes another batch. A CPU runs one batch after the other.
    """
    return 2 if devices[0].startswith("cuda") else 1


class _LaunchedJob(NamedTuple):
    """A launched batch, its start time, and what `Scorer.collect` needs."""

    job: Job
    items: Sequence[Item]
    launched: Any
    since: float


class _JobServer:
    """Receives jobs, runs them and sends the results."""

    def __init__(self, number: int, channel: Connection, clock: Clock = time.monotonic) -> None:
        self.number = number
        self.channel = channel
        self._clock = clock
        self.assignments: SimpleQueue[Assignment] = SimpleQueue()
        self.job: SimpleQueue[tuple[Job, Sequence[Item]]] = SimpleQueue()
        self._last = 0.0  # when the last batch was collected

    def listen(self) -> None:
        """Receive messages in a thread, so that the parent's sends never block; end the process with the parent."""
        try:
            self.assignments.put(self.channel.recv())
            while True:
                self.job.put(self.channel.recv())
        finally:
            os._exit(1)  # at once, whatever other threads compute: the parent is gone

    def serve(self, scorer: Scorer, devices: Sequence[str]) -> None:
        """Run jobs for ever. A batch is collected after the next one was launched, if there is one."""
        begun: deque[_LaunchedJob] = deque()
        while True:
            if not begun or (len(begun) < max_in_flight(devices) and not self.job.empty()):
                failed = self._begin(scorer, begun)
            else:
                failed = self._finish(scorer, begun.popleft())
            if failed:  # outside of `except`, as the error's traceback holds the batch's tensors
                self._recover(failed, scorer)

    def _begin(self, scorer: Scorer, begun: deque[_LaunchedJob]) -> WorkerFailure | None:
        job, items = self.job.get()
        since = self._clock()
        try:
            begun.append(_LaunchedJob(job, items, scorer.launch(items), since))
        except Exception as error:  # noqa: BLE001 - reported to the parent, which continues
            return _failure_of(self.number, job, error)
        return None

    def _finish(self, scorer: Scorer, batch: _LaunchedJob) -> WorkerFailure | None:
        try:
            logits, rescored = scorer.collect(batch.items, batch.launched)
        except Exception as error:  # noqa: BLE001 - as above
            return _failure_of(self.number, batch.job, error)
        # Two batches overlap on a GPU. The second counts from the end of the first, so that the seconds add up.
        since, self._last = max(batch.since, self._last), self._clock()
        self.channel.send(BatchScored(self.number, batch.job, logits, rescored, self._last - since))
        return None

    def _recover(self, event: WorkerFailure, scorer: Scorer) -> None:
        """Free the memory of a failed batch and continue, or end if the device is lost."""
        if broken := scorer.recover():
            self.channel.send(event._replace(kind="died", what=f"{event.what}; {broken}"))
            os._exit(1)
        self.channel.send(event)


def _failure_of(number: int, job: Job | None, error: Exception) -> WorkerFailure:
    what = str(error) if isinstance(error, PairclfError) else f"{type(error).__name__}: {error}{_raised_at(error)}"
    memory = _is_out_of_memory(error)
    raised = error if isinstance(error, PairclfError) else None
    return WorkerFailure(number, job, "memory" if memory else "error", what, raised)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:  # the error can't be one of torch's, and torch need not be imported
        return False
    from accelerate.utils.memory import should_reduce_batch_size
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or should_reduce_batch_size(error)


def _raised_at(error: Exception) -> str:
    """File and line at which the error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
