"""The submission: a valid file from the first moment on, replaced by a better one while the work goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pairclf.console import console
from pairclf.data.tables import Probabilities, check_submission, sample_ids, scores_frame, write_submission
from pairclf.errors import DataError, PairclfError
from pairclf.files import atomic_file
from pairclf.inference.work import Clock
from pairclf.task import Task

EVERY = 30.0
"""Seconds between two submissions: at most a minute old, also where one could not be written."""


class Sink:
    """Where a run's submission goes, as often as it is due.

    The first file must succeed: whoever can't write shall know before hours are spent. A later one that fails (a full
    disk, a folder that can't be written to any more) leaves the one before it, is said once a cause, and the next is
    tried when it is due. The last must succeed again.

    Args:
        out: the submission.
        task: columns and classes.
        sample: sample submission, whose ids, order and columns `out` has.
        ids: of the data file, in its order; they may be set later, but before `write`.
        clock: of the run.
        every: seconds from one submission to the next.

    Attributes:
        seconds: that the last write took.
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
    ) -> None:
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

    def begin(self, prior: ArrayLike) -> None:
        """Let there be a submission: the prior's, unless a valid one of these ids is there, which may be a good one.

        Raises:
            DataError, PairclfError, OSError: as `write_prior`; also where the file that is there can't be replaced.
        """
        if not self._is_valid():
            self.write_prior(prior)
            return
        with atomic_file(self.out) as temporary:
            temporary.write_bytes(self.out.read_bytes())
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
        self._tried = self._clock()
        self.seconds = self._tried - began

    def _say(self, error: Exception) -> None:
        cause = str(getattr(error, "errno", None) or error)
        if cause not in self._said:
            self._said.add(cause)
            console.print(f"{self.out} could not be replaced ({error}); the last one stays, and the next is tried")
