"""The submission: a valid file from the start of the run, replaced as more rows are scored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pairclf.config import Submission
from pairclf.console import console
from pairclf.data.scores import scores_frame
from pairclf.data.submission import check_submission, sample_ids, write_submission
from pairclf.errors import DataError, PairclfError
from pairclf.files import atomic_file, link_or_copy, sha256_file
from pairclf.inference.journal import Journal
from pairclf.inference.messages import Clock
from pairclf.scores.metrics import Floats
from pairclf.task import Task

PREVIOUS_SUBMISSION = "previous.csv"
"""In the work folder: a copy of an earlier run's submission, until this run is complete."""

WRITTEN_HASH = "submission"
"""Key of the journal's note with the SHA-256 of the last submission that this run wrote."""

WRITE_INTERVAL = 30.0
"""Seconds between two writes."""


class SubmissionWriter:
    """Writes a run's submission.

    The first write must succeed (fail early). A later failure, such as a full disk, keeps the previous file, is
    reported once per cause, and is retried at the next write. The last write must succeed.

    An earlier run's submission is never replaced by priors. It stays, with its modification time, until this run has
    scores. This is reported at the start, and again if the run fails before.

    Args:
        out: the submission's path.
        task: columns and classes.
        sample: sample submission that gives ids, order and columns.
        ids: ids of the data file, in its order; may be set later, but before `write`.
        settings: `data.submission`; None: its defaults.
        clock: of the run.
        every: seconds between two writes.
        journal: notes the hash of this run's submission; without a journal, an existing file counts as an earlier
            run's.

    Attributes:
        journal: as above; may be set later, but before `begin`.
        seconds: duration of the last write.
        is_from_earlier_run: whether `out` is still an earlier run's submission.
    """

    def __init__(
        self,
        out: Path,
        task: Task,
        sample: Path | None,
        ids: Sequence[str] | None,
        *,
        settings: Submission | None = None,
        clock: Clock,
        every: float = WRITE_INTERVAL,
        journal: Journal | None = None,
    ) -> None:
        self.is_from_earlier_run = False
        self.journal = journal
        self._work: Path | None = None
        self.out = out
        self.ids = ids
        self.seconds = 0.0
        self._task = task
        self._sample = sample
        self._settings = settings
        self._clock = clock
        self._every = every
        self._last_attempt: float | None = None  # when a file was last written, or failed to be
        self._reported: set[str] = set()
        self._unsaved: Floats | None = None

    def write_prior(self, prior: ArrayLike) -> None:
        """Write the prior `(C,)` for all ids of the sample, or, without a sample, of the data file.

        Raises:
            DataError: the sample can't be used, or the prior is no distribution.
            PairclfError, OSError: the file can't be written.
        """
        ids = self.ids if self._sample is None else sample_ids(self._sample, self._task, self._settings)
        if ids is None:
            raise ValueError("without a sample submission the data's ids must be known")
        self._write_file(ids, np.tile(np.asarray(prior, dtype=np.float64), (len(ids), 1)))

    @contextmanager
    def reporting_older(self, work: Path) -> Iterator[None]:
        """Report an earlier run's submission in `begin`, and again if the block raises before it is replaced.

        Args:
            work: folder of the run, where `begin` keeps a copy of the earlier submission.
        """
        self._work = work
        self.is_from_earlier_run = self.out.is_file()
        try:
            yield
        except BaseException:
            if self.is_from_earlier_run:
                console.print(f"{self.out} is still the submission of an earlier run: this run has not written one")
            raise

    def _is_of_this_run(self) -> bool:
        digest = self.journal.read_note(WRITTEN_HASH) if self.journal else None
        return digest is not None and digest == sha256_file(self.out)

    def begin(self, prior: ArrayLike) -> None:
        """Write the prior, unless a valid submission for these ids exists, which may be better.

        Raises:
            DataError, PairclfError, OSError: as `write_prior`; or the existing file can't be replaced.
        """
        if self._last_attempt is not None:  # the prior was written before there was a journal
            self._note_written()
            return
        self.is_from_earlier_run = self.is_from_earlier_run and not self._is_of_this_run()
        valid = self._is_valid()
        if self.is_from_earlier_run:
            written_at = datetime.fromtimestamp(self.out.stat().st_mtime).astimezone().isoformat(" ", "seconds")
            fate = "is kept until this run has scores" if valid else "is of other rows or columns, and is replaced"
            console.print(f"{self.out} is from an earlier run, written at {written_at}; it {fate}")
        if not valid:
            self.write_prior(prior)
            return
        if self.is_from_earlier_run and self._work:
            with suppress(OSError):  # the journal has reported that this folder is not writable
                (self._work / PREVIOUS_SUBMISSION).unlink(missing_ok=True)
                link_or_copy(self.out, self._work / PREVIOUS_SUBMISSION)
        status = self.out.stat()
        with atomic_file(self.out) as temporary:  # fail now if the file can't be replaced
            temporary.write_bytes(self.out.read_bytes())
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
        self._last_attempt = self._clock()

    def _is_valid(self) -> bool:
        """Whether the existing file has these ids in this order, and valid probabilities."""
        try:
            check_submission(self.out, self._sample or self.out, self._task, self._settings)
            return self._sample is not None or sample_ids(self.out, self._task, self._settings) == self._known_ids()
        except DataError:
            return False

    def due(self, now: float) -> bool:
        """Whether it is time for the next write."""
        return self._last_attempt is None or now - self._last_attempt >= self._every

    def write(self, probabilities: Floats) -> None:
        """Replace the submission; if that fails, keep the existing file.

        Args:
            probabilities: `(N, C)` of the data's rows, in their order. If a row is no distribution, nothing is written.
        """
        self._unsaved = probabilities
        try:
            self._write_file(self._known_ids(), probabilities)
        except (OSError, PairclfError) as error:
            self._last_attempt = self._clock()
            self._report_once(error)
        else:
            self._unsaved = None

    def close(self, probabilities: Floats | None = None) -> None:
        """Write the final submission.

        Args:
            probabilities: None: those of the last `write`, if that failed.

        Raises:
            PairclfError, OSError: it can't be written; the previous file is kept.
        """
        last = self._unsaved if probabilities is None else probabilities
        if last is not None:
            self._write_file(self._known_ids(), last)
            self._unsaved = None

    def _known_ids(self) -> Sequence[str]:
        if self.ids is None:
            raise ValueError("the data's ids must be known before its rows are written")
        return self.ids

    def _write_file(self, ids: Sequence[str], probabilities: Floats) -> None:
        began = self._clock()
        scores = scores_frame(ids, probabilities, self._task, orders=1, models=[])
        write_submission(self.out, scores, self._task, self._sample, self._settings)
        self.is_from_earlier_run = False
        self._note_written()
        self._last_attempt = self._clock()
        self.seconds = self._last_attempt - began

    def _note_written(self) -> None:
        """Note in the journal that the file is this run's."""
        if self.journal:
            self.journal.write_note(WRITTEN_HASH, sha256_file(self.out))

    def _report_once(self, error: Exception) -> None:
        cause = str(getattr(error, "errno", None) or error)
        if cause not in self._reported:
            self._reported.add(cause)
            console.print(
                f"{self.out} could not be written ({error}); the previous file is kept, and writing is retried"
            )
