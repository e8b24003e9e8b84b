"""The submission: a valid file from the first moment on, replaced by a better one while the work goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pairclf.console import console
from pairclf.data.tables import Probabilities, check_submission, sample_ids, scores_frame, write_submission
from pairclf.errors import DataError, PairclfError
from pairclf.files import atomic_file, link_or_copy, sha256_file
from pairclf.inference.journal import Journal
from pairclf.inference.work import Clock
from pairclf.task import Task

PREVIOUS = "previous.csv"
"""In the work folder: the submission of an earlier run, until this run is done."""

WRITTEN = "submission"
"""The journal's note of the last submission that this run wrote: its SHA-256."""

EVERY = 30.0
"""Seconds between two submissions: at most a minute old, also where one could not be written."""


class Sink:
    """Where a run's submission goes, as often as it is due.

    The first file must succeed: whoever can't write shall know before hours are spent. A later one that fails (a full
    disk, a folder that can't be written to any more) leaves the one before it, is said once a cause, and the next is
    tried when it is due. The last must succeed again.

    A submission of an earlier run is never replaced by priors. It stays, with the time at which it was written, until
    this run has scores; the user is told so at the start, and again if the run fails before it has any.

    Args:
        out: the submission.
        task: columns and classes.
        sample: sample submission, whose ids, order and columns `out` has.
        ids: of the data file, in its order; they may be set later, but before `write`.
        clock: of the run.
        every: seconds from one submission to the next.
        journal: of the run, which remembers what this run wrote; without one, any file that is there is an earlier
            run's.

    Attributes:
        seconds: that the last write took.
        older: whether `out` is of an earlier run, and still the best there is.
    """

    def __init__(
        self,
        out: Path,
        task: Task,
        sample: Path | None,
        ids: Sequence[str] | None,
        *,
        clock: Clock,
        every: float = EVERY,
        journal: Journal | None = None,
    ) -> None:
        self.older = False
        self._journal = journal
        self._work: Path | None = None
        self.out = out
        self.ids = ids
        self.seconds = 0.0
        self._task = task
        self._sample = sample
        self._clock = clock
        self._every = every
        self._tried: float | None = None  # when a file was last written, or failed to be
        self._said: set[str] = set()
        self._unwritten: Probabilities | None = None

    def write_prior(self, prior: ArrayLike) -> None:
        """Write the prior `(C,)` for all ids of the sample, or, without a sample, of the data file.

        Raises:
            DataError: the sample can't be used, or the prior is no distribution.
            PairclfError, OSError: the file can't be written.
        """
        ids = self.ids if self._sample is None else sample_ids(self._sample, self._task)
        if ids is None:
            raise ValueError("without a sample submission the data's ids must be known")
        self._put(ids, np.tile(np.asarray(prior, dtype=np.float64), (len(ids), 1)))

    @contextmanager
    def telling_of_older(self, work: Path) -> Iterator[None]:
        """Say at the start that `out` is of an earlier run, if it is, and say it again if the block raises before
        it was replaced.

        Args:
            work: folder of the run, where `begin` keeps the earlier submission as `PREVIOUS`.
        """
        self._work = work
        self.older = self.out.is_file() and not self._is_of_this_run()
        if self.older:
            at = datetime.fromtimestamp(self.out.stat().st_mtime).astimezone().isoformat(" ", "seconds")
            console.print(f"{self.out} is of an earlier run, written at {at}; it stays until this run has scores")
        try:
            yield
        except BaseException:
            if self.older:
                console.print(f"{self.out} is still the submission of an earlier run: this run wrote none")
            raise

    def _is_of_this_run(self) -> bool:
        noted = self._journal.noted(WRITTEN) if self._journal else None
        return noted is not None and noted == sha256_file(self.out)

    def begin(self, prior: ArrayLike) -> None:
        """Let there be a submission: the prior's, unless a valid one of these ids is there, which may be a good one.

        Raises:
            DataError, PairclfError, OSError: as `write_prior`; also where the file that is there can't be replaced.
        """
        if not self._is_valid():
            self.write_prior(prior)
            return
        if self.older and self._work:
            with suppress(OSError):  # where nothing can be written, the journal has said so
                (self._work / PREVIOUS).unlink(missing_ok=True)
                link_or_copy(self.out, self._work / PREVIOUS)
        was = self.out.stat()
        with atomic_file(self.out) as temporary:  # whether it can be replaced is found out now
            temporary.write_bytes(self.out.read_bytes())
            os.utime(temporary, ns=(was.st_atime_ns, was.st_mtime_ns))
        self._tried = self._clock()

    def _is_valid(self) -> bool:
        """Whether the file that is there has the ids in their order, and numbers that can be scored."""
        try:
            check_submission(self.out, self._sample or self.out, self._task)
            return self._sample is not None or sample_ids(self.out, self._task) == self._known()
        except DataError:
            return False

    def due(self, now: float) -> bool:
        """Whether it is time for a better file."""
        return self._tried is None or now - self._tried >= self._every

    def write(self, probabilities: Probabilities) -> None:
        """Replace the submission, or leave it where that fails.

        Args:
            probabilities: `(N, C)` of the data's rows, in their order. Where a row is no distribution nothing is
                written either: the file that is there is valid.
        """
        self._unwritten = probabilities
        try:
            self._put(self._known(), probabilities)
        except (OSError, PairclfError) as error:
            self._tried = self._clock()
            self._say(error)
        else:
            self._unwritten = None

    def close(self, probabilities: Probabilities | None = None) -> None:
        """Write the last submission; without `probabilities`, the last ones given, if they are not in the file yet.

        Raises:
            PairclfError, OSError: it can't be written; the last that could is still there.
        """
        last = self._unwritten if probabilities is None else probabilities
        if last is not None:
            self._put(self._known(), last)
            self._unwritten = None

    def _known(self) -> Sequence[str]:
        if self.ids is None:
            raise ValueError("the data's ids must be known before its rows are written")
        return self.ids

    def _put(self, ids: Sequence[str], probabilities: Probabilities) -> None:
        began = self._clock()
        scores = scores_frame(ids, probabilities, self._task, orders=1, models=[])
        write_submission(self.out, scores, self._task, self._sample)
        self.older = False
        if self._journal:
            self._journal.note(WRITTEN, sha256_file(self.out))
        self._tried = self._clock()
        self.seconds = self._tried - began

    def _say(self, error: Exception) -> None:
        cause = str(getattr(error, "errno", None) or error)
        if cause not in self._said:
            self._said.add(cause)
            console.print(f"{self.out} could not be replaced ({error}); the last one stays, and the next is tried")
