"""An inference server, for competitions that send their test rows in batches through `kaggle_evaluation`.

    server = Server([Path("bundle")], seconds=8.5 * 3600)    # models load in worker processes
    DefaultInferenceServer(server.predict).serve()           # Kaggle's class, which sends batch after batch

Each batch is a small prediction with the inputs, event loop, workers and blend of `pairclf predict`. The differences:
workers keep their models between batches, and the number of rows is not known in advance.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.console import console, counted
from pairclf.data.rows import in_memory
from pairclf.data.submission import answer, can_fill
from pairclf.errors import ConfigError, DataError, PairclfError
from pairclf.inference.deadline import format_duration
from pairclf.inference.ensemble import Ensemble, open_ensemble
from pairclf.inference.loop import PredictionResult
from pairclf.inference.messages import Clock
from pairclf.inference.resident import ResidentEnsemble
from pairclf.inference.state import orders_of
from pairclf.inputs.sequences import Ints, SequenceIndex
from pairclf.scores.metrics import Floats
from pairclf.task import HIDDEN_ROWS
from pairclf.trust import Trust, grant

BATCH_SECONDS = 300.0
"""Kaggle's limit for the answer to a batch, but for the first (`kaggle_evaluation`'s gateways: 60 * 5)."""

FIRST_SECONDS = 2700.0
"""Time limit for loading the models: the first answer may take an hour (`core/relay.py`, DEFAULT_DEADLINE_SECONDS)."""

RESERVED_SHARE = 0.2
"""Share of a batch's time limit that is reserved for encoding, transport, and a slow last pass."""

REMAINING_MARGIN = 1.25
"""Safety factor for the estimated time of the remaining rows."""

MAX_REPORTED_ROWS = 5
"""Failed rows that are reported by id, at most."""


class Server:
    """Keeps models loaded and scores batches of rows. Not thread-safe.

    Args:
        members: bundles, or the YAML file of an ensemble.
        base: folder of the base model on this machine.
        seconds: time limit for all rows, from now on. Rows that arrive later get the prior.
        overrides: `key=value` for settings under `predict`, `model.dtype` and `model.attn_implementation`.
        rows: expected number of rows. If the time does not suffice for both orders, rows are scored in one.
        batch_seconds: time limit for a batch; the first may take longer, as it waits for the models.
        strict: raise if no model can be loaded; else all rows get the prior.
        trust: permissions for this process from now on; None: unchanged.
        clock: seconds; must be picklable, as workers use it too.

    Raises:
        BundleError, ConfigError: as `open_ensemble`; or a member scores only a share of the rows.
        ModelError: the models don't fit into memory together.
    """

    def __init__(
        self,
        members: Sequence[Path],
        *,
        base: Path | None = None,
        seconds: float,
        overrides: Sequence[str] = (),
        rows: int = HIDDEN_ROWS,
        batch_seconds: float = BATCH_SECONDS,
        strict: bool = True,
        trust: Trust | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        if trust is not None:
            grant(trust)
        self._clock = clock
        self._end = clock() + seconds
        self._rows = rows
        self._batch_seconds = batch_seconds
        self._strict = strict
        self._ensemble = open_ensemble(members, base, overrides)
        _check_shares(self._ensemble)
        self._resident = ResidentEnsemble(self._ensemble, overrides, clock)
        self._swap = self._ensemble.settings.swap
        self._counts: Counter[str] = Counter(dict.fromkeys(("rows", "both", "one", "priors", "failed", "batches"), 0))
        self._seconds_spent = 0.0
        self._lost: set[str] = set()
        models, time_limit = counted(len(self._ensemble.members), "model"), format_duration(seconds)
        allowed = f"at most {time_limit} for {counted(rows, 'row')}"
        console.print(f"serving {models}: {self._resident.placement.why}; {allowed}")

    def close(self) -> None:
        """Terminate the workers."""
        self._resident.close()

    def report(self) -> dict[str, float]:
        """Statistics so far: `rows`, scored in `both` orders, in `one`, or with the prior (`priors`); `failed` rows;
        `batches`, and their `seconds`."""
        return {**self._counts, "seconds": self._seconds_spent}

    def predict(self, test: Any, *others: Any) -> pl.DataFrame:
        """Score a batch.

        Args:
            test: a polars or pandas DataFrame with the task's columns and `id`.
            others: other tables of the competition. If one is the sample submission of these rows, the answer has its
                ids, order and columns.

        Returns:
            `id`, in its original type, and a column for each class (or the label column); one row for each input row.

        Raises:
            DataError: a column is missing, or the sample has other ids.
            BundleError: a file of a bundle was changed.
            PairclfError: with `strict`, no model can be loaded.
        """
        start = self._clock()
        rows, task, row_id = in_memory(test), self._ensemble.task, self._row_id
        if row_id not in rows.columns:
            raise DataError(
                f"a batch has columns {rows.columns}, and no {row_id}",
                remedy="pass the test rows as the first argument; data.test.columns={id: COLUMN} names the ids",
            )
        sample = self._sample(others)
        probabilities, orders = self._score(rows) if len(rows) else self._priors(0)
        self._counts.update(rows=len(rows), batches=1, both=int((orders > 1).sum()), one=int((orders == 1).sum()))
        self._counts.update(priors=int((orders == 0).sum()))
        self._seconds_spent += self._clock() - start
        return answer(rows[row_id], probabilities, task, sample, self._ensemble.submission)

    @property
    def _row_id(self) -> str:
        return self._ensemble.data.test.columns.get("id") or "id"

    def _sample(self, others: Sequence[Any]) -> pl.DataFrame | None:
        """The first table that has a submission's columns."""
        tables = (
            frame
            for frame in others
            if hasattr(frame, "columns")
            and can_fill(list(frame.columns), self._ensemble.task, self._ensemble.submission)
        )
        sample = next(tables, None)
        return None if sample is None else in_memory(sample)

    def _priors(self, rows: int) -> tuple[Floats, Ints]:
        """The result of `_score` for rows that are not scored."""
        return np.tile(self._ensemble.prior, (rows, 1)), np.zeros(rows, dtype=np.int64)

    def _score(self, rows: pl.DataFrame) -> tuple[Floats, Ints]:
        """Probabilities `(N, C)`, and the number of orders behind each row, `(N,)`."""
        self._resident.wait_until_loaded(min(self._clock() + FIRST_SECONDS, self._end))
        start = self._clock()
        inputs = self._resident.encode(rows)
        stop, swap = self._plan(inputs, start)
        if stop <= self._clock():
            return self._priors(len(rows))
        try:
            result = self._resident.score(inputs, swap=swap, stop=stop)
        except PairclfError as error:
            if self._strict:
                raise
            self._report_lost("all models", str(error))
            return self._priors(len(rows))
        self._report_failures(rows[self._row_id], result)
        return result.state.probabilities(), result.state.num_orders()

    def _plan(self, inputs: Sequence[SequenceIndex], began: float) -> tuple[float, str]:
        """Clock time at which this batch's scoring ends, and `predict.swap` for it.

        If the remaining time suffices for both orders of all expected rows, at the measured cost of a row, the batch
        may use its whole time limit. Otherwise its rows are scored in one order, within the batch's share of the
        remaining time but at least by the first model. Unused time is left to later batches, which may get both orders
        again.
        """
        models, budget = self._resident.models, self._resident.budget
        limit = min(began + (1 - RESERVED_SHARE) * self._batch_seconds, self._end)
        rows, served = len(inputs[0].lengths), self._counts["rows"]
        expected = mean = 0.0
        for member, (resident, index) in enumerate(zip(models, inputs, strict=True)):
            workload = resident.add_batch(index, orders_of(self._swap, member, index), budget)
            if resident.is_measured:  # others have not scored anything yet, or are lost
                expected += resident.seconds(workload)
                mean += resident.seconds(resident.total_workload) / (served + rows)
        seconds_left, rows_to_come = self._end - began, max(self._rows - served, served // 10, rows)
        shortage = REMAINING_MARGIN * mean * rows_to_come / max(seconds_left, 1e-9)
        if shortage <= 1:
            return limit, self._swap
        swap = "split" if self._swap == "split" else "off"
        if len(models) == 1:  # one order of one model is the minimum
            return limit, swap
        share_of_time = expected / shortage
        first = models[0].seconds(models[0].workload(inputs[0], orders_of(swap, 0, inputs[0]), budget))
        return min(limit, began + max(share_of_time, REMAINING_MARGIN * first)), swap

    def _report_failures(self, ids: pl.Series, result: PredictionResult) -> None:
        for name, why in result.lost_models.items():
            self._report_lost(name, why)
        for row, why in {row: why for failures in result.state.failed for (row, _), why in failures.items()}.items():
            self._counts["failed"] += 1
            if self._counts["failed"] <= MAX_REPORTED_ROWS:
                console.print(f"row {ids[row]} could not be scored: {why}")

    def _report_lost(self, name: str, why: str) -> None:
        """Print a warning, once for each model."""
        if name not in self._lost:
            self._lost.add(name)
            console.print(f"WARNING: {name} can't be used: {why}")


def _check_shares(ensemble: Ensemble) -> None:
    """Refuse cascades: the most uncertain rows can only be selected when all rows are known."""
    for place, member in enumerate(ensemble.members):
        if member.share < 1:
            raise ConfigError(
                f"members.{place}.share={member.share:g} selects the most uncertain of all rows, and a server gets "
                "rows in batches",
                remedy="set share: 1, or package the ensemble as a notebook (package.kernel_type=notebook)",
            )
