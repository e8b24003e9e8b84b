"""Faults as workers meet them. Workers import this module, so it imports little."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np

from pairclf.approaches.protocol import Scorer
from pairclf.errors import BundleError
from pairclf.inference import worker
from pairclf.inputs.sequences import Item
from pairclf.rehearsal.shared_clock import SharedClock
from pairclf.scores.metrics import Floats

PASS = 10.0
"""Seconds of a pass by a clock that is turned."""


class Faulty:
    """A scorer that does something to rows whose index is `row`, or to all."""

    def __init__(self, scorer: Scorer, kind: str, row: int | None, clock: SharedClock | None) -> None:
        self.scorer, self.kind, self.row, self.clock = scorer, kind, row, clock

    def launch(self, items: Sequence[Item]) -> Any:
        here = self.row is None or any(item.row == self.row for item in items)
        if here and self.kind == "raise":
            raise ZeroDivisionError("a poisoned row")
        if here and self.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "memory" and len(items) > 2:
            raise MemoryError
        if self.clock is not None:
            self.clock.last(PASS)
        return self.scorer.launch(items)

    def collect(self, items: Sequence[Item], launched: Any) -> tuple[Floats, int]:
        logits, rescued = self.scorer.collect(items, launched)
        if self.kind == "nan":
            bad = [self.row is None or item.row == self.row for item in items]
            logits[np.array(bad)] = np.nan
        return logits, rescued

    def recover(self) -> str | None:
        return self.scorer.recover()


def quick(assignment: worker.Assignment) -> worker.Loaded:
    """`load_bundle` without a forecast of its memory, which takes longer than all else that a tiny model does."""
    from pairclf.approaches import torch_models

    torch_models._memory = lambda *_: ("", None)
    return worker.load_bundle(assignment)


def faulty(
    assignment: worker.Assignment, *, kind: str, row: int | None = None, clock: SharedClock | None = None
) -> worker.Loaded:
    loaded = quick(assignment)
    return loaded._replace(scorer=Faulty(loaded.scorer, kind, row, clock))


def killed_after_a_batch(*arguments: str) -> None:
    """`pairclf ARGUMENTS`, which is killed when its first batch is in the journal."""
    from pairclf.inference.journal import Journal
    from support.forked import command

    add = Journal.add

    def add_and_die(journal: Journal, *batch: Any) -> None:
        add(journal, *batch)
        os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = add_and_die  # type: ignore[method-assign]
    command(*arguments)


def unloadable(assignment: worker.Assignment) -> worker.Loaded:
    if "fold1" in str(assignment.bundle):
        raise BundleError("the second one does not load")
    return quick(assignment)
