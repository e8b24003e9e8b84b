"""The planner: which passes are worth the remaining time, and which rows form the next batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pairclf.inference.deadline import format_duration
from pairclf.inference.messages import Clock, RowOrders
from pairclf.inference.pending import PendingSequences
from pairclf.inference.schedule import CandidatePass, PlannedPass, reserved_seconds, schedule
from pairclf.inference.state import PredictionState, orders_of, pass_name
from pairclf.inference.throughput import SequenceCost, ThroughputModel
from pairclf.inputs.sequences import Ints, SequenceIndex
from pairclf.scores.metrics import Floats

SLOWDOWN_MARGIN = 3.0
"""Both orders of a row are scored together (their shared tokens are computed once) only if the first orders of all
unscored rows would still be in time at a speed this many times lower."""

REPLAN_AFTER = 8
"""Passes between two plans."""

MAX_PASS_SHARE = 0.05
"""Largest share of the remaining time for one pass, so that little is lost when the deadline interrupts a pass."""

MAX_HALVINGS = 6
"""Most halvings of the token budget that keep a pass within that share. Before the first measurement: three."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A member of the ensemble, as the planner needs it.

    Attributes:
        name: for messages.
        inputs: its sequences.
        cost: operations of a sequence.
        speed: operations a second of one worker, a first estimate.
        load_seconds: seconds to load the model, a first estimate.
        gain, gain_swap: expected gain of the model and of its second order with their shares, in nats a row over all.
        share: fraction of the rows that it scores, the most uncertain ones.
        swap_share: fraction of these whose second order it scores, the most uncertain ones, where it scores both.
        approach: how it computes; speeds measured on one model are estimates for others of its approach alone.
    """

    name: str
    inputs: SequenceIndex
    cost: SequenceCost
    speed: float
    load_seconds: float
    gain: float
    gain_swap: float
    share: float = 1.0
    swap_share: float = 1.0
    approach: str = "finetune"


class Planner:
    """The plan of one run.

    Args:
        models: the ensemble's members.
        state: the scores so far, which rank rows by uncertainty.
        clock: of the run.
        swap: `predict.swap`.
        budget: initial token budget of a forward pass.
        stop: clock time at which scoring ends; infinite: no deadline.
    """

    def __init__(
        self,
        models: Sequence[PlannedModel],
        state: PredictionState,
        clock: Clock,
        *,
        swap: str,
        budget: int,
        stop: float,
    ) -> None:
        self.models = models
        self.swap = swap
        self.budget = budget
        """Token budget of a forward pass; lowered while a model runs out of memory."""
        self.stop = stop
        self.num_workers = 1
        self.current = -1
        """Index of the loaded model; -1: none yet."""
        self.unusable: set[int] = set()
        """Models that could not be loaded or killed their workers."""
        self._orders = [orders_of(swap, member, model.inputs, model.swap_share) for member, model in enumerate(models)]
        self.pending_by_model = [
            PendingSequences(model.inputs, orders) for model, orders in zip(models, self._orders, strict=True)
        ]
        self.throughput_by_model = [ThroughputModel(model.cost, model.speed) for model in models]
        self.load_seconds = [model.load_seconds for model in models]
        self.planned_passes: list[PlannedPass] = []
        self._initial_budget = budget
        self._state = state
        self._clock = clock
        self._started: set[int] = set()
        self._rows: dict[int, Ints] = {}
        """By started model: the rows that it scores."""
        self._has_second_rows = {member for member, model in enumerate(models) if model.swap_share in (0, 1)}
        """Models for which the rows of the second order are known."""
        self._retries: list[tuple[RowOrders, ...]] = []
        self._queue: list[list[int]] = []
        self._queue_key: tuple[object, ...] = ()
        self._passes_since_plan = REPLAN_AFTER

    @property
    def has_no_deadline(self) -> bool:
        """Without a deadline everything is scored, in the same passes on every run."""
        return self.stop == float("inf")

    @property
    def pending(self) -> PendingSequences:
        return self.pending_by_model[self.current]

    @property
    def throughput(self) -> ThroughputModel:
        return self.throughput_by_model[self.current]

    def start_model(self, member: int) -> None:
        """Make a model the current one. The first time, restrict a cascade's model to the most uncertain rows.

        Uncertainty comes from the models before it, not from its own scores: so a resumed run selects the same rows.
        """
        self.current, self._queue, self._retries, self._passes_since_plan = member, [], [], REPLAN_AFTER
        self.budget = self._initial_budget
        share, rows = self.models[member].share, len(self.pending_by_model[member])
        if member not in self._started:
            self._rows[member] = np.arange(rows)
            if share < 1:
                self._rows[member] = np.argsort(-self._state.uncertainty(member), kind="stable")[: round(share * rows)]
                self.pending_by_model[member].restrict_to(self._rows[member])
        self._started.add(member)

    def _choose_second_rows(self) -> None:
        """Restrict the current model's second order to its share, once all first orders are known.

        Uncertainty comes from first orders, and from the models before it: a resumed run selects the same rows.
        """
        member, pending = self.current, self.pending
        if member in self._has_second_rows or self._retries or pending.rows_left(1).any():
            return
        rows, unscored = self._rows[member], (pending.rank == 1) & ~self._state.is_scored(member)
        if any((row, order) not in self._state.failed[member] for row, order in np.argwhere(unscored).tolist()):
            return  # a worker still has some
        ranked = rows[np.argsort(-self._state.uncertainty_in_first_order(member)[rows], kind="stable")]
        pending.restrict_second_to(ranked[: round(self.models[member].swap_share * len(rows))])
        self._has_second_rows.add(member)
        self._passes_since_plan = REPLAN_AFTER + 1

    # --- the plan --------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Plan the remaining passes for the remaining time."""
        self._passes_since_plan = 0
        candidates = self._candidates()
        if self.has_no_deadline:
            self.planned_passes = [PlannedPass(candidate, 1.0) for candidate in candidates]
        else:
            self.planned_passes = schedule(candidates, self.stop - self._clock())

    def _candidates(self) -> list[CandidatePass]:
        """All passes with pending sequences, at their current cost estimate."""
        candidates = []
        for member, model in enumerate(self.models):
            throughput, pending = self._throughput_of(member), self.pending_by_model[member]
            load_seconds = 0.0 if member == self.current else self.load_seconds[member]
            # A cascade's model is not restricted to its share of rows before it starts.
            share = model.share if member not in self._started else 1.0
            for rank, gain in ((1, model.gain), (2, model.gain_swap)):
                workload = pending.workload_left(self.budget, rank)
                if rank == 2 and member not in self._has_second_rows:
                    share *= model.swap_share
                if workload.tokens and member not in self.unusable:
                    seconds = share * throughput.seconds(workload) * throughput.margin / self.num_workers
                    candidates.append(CandidatePass(member, rank, seconds, load_seconds, gain))
        return candidates

    def _throughput_of(self, member: int) -> ThroughputModel:
        """The model's own throughput. Before its first pass: the current model's speed, which was measured on this
        machine, replaces the first estimate."""
        fitted = self.current >= 0 and self._is_alike(member) and self.throughput.is_fitted
        if fitted and not self.throughput_by_model[member].is_fitted:
            self.throughput_by_model[member] = ThroughputModel(self.models[member].cost, self.throughput.speed)
        return self.throughput_by_model[member]

    def _is_alike(self, member: int) -> bool:
        """Whether a model is of the current model's approach."""
        return self.models[member].approach == self.models[self.current].approach

    def observe_load(self, seconds: float) -> None:
        """Record the current model's load time; scale it by size for models like it that have not been loaded."""
        size = self.models[self.current].cost.linear
        for member, model in enumerate(self.models):
            if member == self.current or (member not in self._started and self._is_alike(member)):
                self.load_seconds[member] = seconds * model.cost.linear / size

    def name(self, member: int, rank: int) -> str:
        """`fold0 BA`."""
        model = self.models[member]
        return pass_name(model.name, self._orders[member][rank - 1], model.inputs.lengths.shape[1])

    def describe(self) -> str:
        """The plan in words: passes that are scored fully, in part, and not at all."""
        passes = [(self.name(*planned.candidate[:2]), planned) for planned in self.planned_passes]
        full = [f"{name} {format_duration(planned.seconds)}" for name, planned in passes if planned.share == 1]
        partial = [f"{planned.share:.0%} of {name}" for name, planned in passes if 0 < planned.share < 1]
        skipped = [f"not {name}" for name, planned in passes if planned.share == 0]
        return ", ".join([*full, *partial, *skipped])

    def worth_reloading(self) -> set[int]:
        """Models with planned passes. A model that was unloaded counts only if its passes take longer than its load."""
        planned_seconds: dict[int, float] = {}
        for planned in self.planned_passes:
            if planned.share > 0:
                member = planned.candidate.member
                seconds = planned.share * planned.candidate.seconds
                planned_seconds[member] = planned_seconds.get(member, 0.0) + seconds
        unloaded = self._started - {self.current}
        return {
            member
            for member, seconds in planned_seconds.items()
            if member not in unloaded or seconds > self.load_seconds[member]
        }

    @property
    def plan_key(self) -> dict[tuple[int, int], int]:
        """2, 1 or 0 for each pass: scored fully, in part, not at all. A plan with the same key is not printed again."""
        return {
            planned.candidate[:2]: math.ceil(planned.share) + math.floor(planned.share)
            for planned in self.planned_passes
        }

    # --- batches ---------------------------------------------------------------------------------------------------

    def next_batch(self, free_at: float) -> tuple[RowOrders, ...]:
        """The next batch of the current model; empty if nothing is pending or would be in time.

        Args:
            free_at: clock time at which a worker is expected to start on it.
        """
        self._choose_second_rows()
        self._passes_since_plan += 1
        if self._passes_since_plan > REPLAN_AFTER:
            self.plan()
        if self._retries:
            return self._take(self._retries.pop())
        rank = 1 if self.pending.rows_left(1).any() else 2
        is_chosen = self.current in self._has_second_rows
        if rank == 2 and not is_chosen:
            return ()  # the most uncertain rows are known when all first orders are
        if self.has_no_deadline:
            return self._take(self._longest_rows(None if is_chosen else 1))
        until = self.stop - reserved_seconds(self.planned_passes, self.current, rank)
        share = self._planned_share(rank)
        if rank == 1 and self._both_orders_in_time(until):
            return self._take(self._longest_rows(None))
        # The first model's first order may use all the time, whatever else is planned: a row without any score gets
        # the prior, which costs far more than a missing second score.
        is_first_pass = self.current == 0 and rank == 1
        if is_first_pass:
            until = self.stop
        if share == 0:
            return ()
        if is_first_pass and share == 1:
            return self._take(self._limited_to(self._longest_rows(rank), until - free_at))
        return self._take(self._limited_to(self._most_valuable_rows(rank), until - free_at))

    def _take(self, batch: tuple[RowOrders, ...]) -> tuple[RowOrders, ...]:
        self.pending.mark_taken(batch)
        return batch

    def _planned_share(self, rank: int) -> float:
        """The planned share of a pass of the current model."""
        shares = (planned.share for planned in self.planned_passes if planned.candidate[:2] == (self.current, rank))
        return next(shares, 0.0)

    def _both_orders_in_time(self, until: float) -> bool:
        """Whether both orders of all pending rows are in time if scored together; see `SLOWDOWN_MARGIN`."""
        if self.swap != "full" or self.current not in self._has_second_rows or self._planned_share(2) < 1:
            return False
        seconds_left = until - self._clock()
        both = self.throughput.seconds(self.pending.workload_left(self.budget)) * self.throughput.margin
        first = self.throughput.seconds(self.pending.workload_left(self.budget, 1))
        return both / self.num_workers <= seconds_left and SLOWDOWN_MARGIN * first / self.num_workers <= seconds_left

    def _pass_budget(self) -> int:
        """Token budget of the next pass: halved until a pass stays within `MAX_PASS_SHARE` of the remaining time."""
        if self.has_no_deadline:
            return self.budget
        halvings = 3.0
        if self.throughput.is_fitted:
            workload = self.pending.workload_left(self.budget)
            seconds = self.throughput.seconds(workload) / max(self.pending.batches_left(self.budget), 1.0)
            allowed = MAX_PASS_SHARE * (self.stop - self._clock())
            # A power of two, so that small changes of the estimate don't cut all batches anew.
            halvings = np.ceil(np.log2(max(1.0, seconds / max(allowed, 1e-9))))
        return max(1, self.budget >> int(min(halvings, MAX_HALVINGS)))

    def _longest_rows(self, rank: int | None) -> tuple[RowOrders, ...]:
        """The next batch in order of length, longest rows first."""
        key = ("longest", rank, budget := self._pass_budget())
        if self._queue_key != key or not self._queue:
            self._queue, self._queue_key = self.pending.batches(budget, rank)[::-1], key
        return self._from_queue(rank)

    def _most_valuable_rows(self, rank: int) -> tuple[RowOrders, ...]:
        """A batch of the units with most uncertainty a token; with `swap=budget` simply of the most uncertain ones."""
        key = ("most valuable", rank, budget := self._pass_budget())
        if self._queue_key != key or not self._queue:
            tokens = self.pending.tokens_left(rank)
            value = self._of_unit(self._state.uncertainty() * self.pending.rows_left(rank))
            if self.swap != "budget" or rank == 1:
                value = value / np.maximum(self._of_unit(tokens), 1)
            ranked = np.argsort(-value, kind="stable")[: np.count_nonzero(value)]
            padded = self.pending.record.pads
            room = self.pending.room(budget)
            batches = _split_by_budget(ranked.tolist(), tokens.tolist(), room, REPLAN_AFTER, padded=padded)
            self._queue, self._queue_key = batches[::-1], key
        return self._from_queue(rank)

    def _of_unit(self, values: Floats | Ints) -> Floats:
        """`(N,)`: the sum of a value over each row's unit."""
        unit_of = self.pending.inputs.unit_of
        sums: Floats = np.bincount(unit_of, weights=values).astype(np.float64)[unit_of]
        return sums

    def _from_queue(self, rank: int | None) -> tuple[RowOrders, ...]:
        """The pending part of the next queued batch that has any."""
        while self._queue:
            if batch := self.pending.row_orders(self._queue.pop(), rank):
                return tuple(batch)
        return ()

    def _limited_to(self, batch: tuple[RowOrders, ...], seconds: float) -> tuple[RowOrders, ...]:
        """The batch, halved until one worker is expected to finish it in `seconds`."""
        while batch and self.throughput.is_fitted and self.seconds(batch) * self.throughput.margin > seconds:
            batch = batch[: len(batch) // 2]
        return batch

    def seconds(self, batch: Sequence[RowOrders]) -> float:
        """Expected seconds of one worker for a batch."""
        return self.throughput.seconds(self.pending.workload_of(batch))

    def retry(self, batch: tuple[RowOrders, ...], *, whole: bool) -> None:
        """Retry a failed batch as it is, or in halves."""
        self._retries += [batch] if whole else _halves(batch)

    def lower_budget(self, tokens: float) -> bool:
        """Halve the token budget after an out-of-memory error at `tokens`; returns whether it changed."""
        lower = max(1, int(tokens) // 2)
        if lower >= self.budget:
            return False
        self.budget = lower
        return True

    def drop_retries(self) -> None:
        """Make the sequences of waiting retries pending again."""
        for batch in self._retries:
            self.pending.put_back(batch)
        self._retries = []


def _split_by_budget(
    rows: Sequence[int], tokens: Sequence[int], budget: int, max_batches: int, *, padded: bool
) -> list[list[int]]:
    """Split rows, in their order, into at most `max_batches` batches of at most `budget` tokens (padding counts)."""
    batches: list[list[int]] = []
    size = longest = 0
    for row in rows:
        longest = max(longest, tokens[row])
        new_size = (len(batches[-1]) + 1) * longest if padded and batches else size + tokens[row]
        if not batches or new_size > budget:
            if len(batches) == max_batches:
                break
            batches.append([])
            new_size = longest = tokens[row]
        batches[-1].append(row)
        size = new_size
    return batches


def _halves(batch: tuple[RowOrders, ...]) -> list[tuple[RowOrders, ...]]:
    """Two halves of a batch; a single row in two orders is split by order."""
    if len(batch) == 1:
        row, orders = batch[0]
        return [(RowOrders(row, (order,)),) for order in orders]
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]
