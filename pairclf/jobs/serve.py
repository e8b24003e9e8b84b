"""Answers batch by batch, for competitions that hand out their test rows through `kaggle_evaluation`.

    server = Server([Path("bundle")], seconds=8.5 * 3600)    # models load, in processes of their own
    DefaultInferenceServer(server.predict).serve()           # Kaggle's; asks for a batch after the other

Each batch is a small prediction: the inputs, the conductor, the workers and the blend are those of `pairclf predict`.
What differs is that the workers stay, and that nobody knows how many rows will come.

Used from a script, it must be made under `if __name__ == "__main__"`: new processes import what started them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pairclf.console import console
from pairclf.data.audit import clean
from pairclf.data.tables import answer, can_fill, in_memory, rows_in_memory, to_rows
from pairclf.errors import ConfigError, DataError, ModelError, PairclfError
from pairclf.inference.agenda import Part
from pairclf.inference.backlog import Backlog, Inputs, Ints, Load, look_at
from pairclf.inference.conduct import DEATHS, Conductor, Nowhere, Outcome, Report
from pairclf.inference.crew import Model, ProcessCrew, warm_up
from pairclf.inference.deadline import spoken
from pairclf.inference.devices import HEADROOM, Placement, choose, model_bytes
from pairclf.inference.members import Ensemble, Member, open_ensemble
from pairclf.inference.memory import Largest
from pairclf.inference.pace import Pace
from pairclf.inference.standing import orders_of
from pairclf.inference.work import Clock, Event, Failed, Floats, Ready, Scored, Work
from pairclf.inputs.plan import token_budget
from pairclf.inputs.render import Encoded
from pairclf.jobs.estimate import memory_to_have
from pairclf.jobs.predict import SPEED, recipe, shape_of
from pairclf.model.bundle import Bundle, open_bundle
from pairclf.trust import Trust, grant

BATCH_SECONDS = 300.0
"""Kaggle's limit for the answer to a batch, but for the first (`kaggle_evaluation`'s gateways: 60 * 5)."""

FIRST_SECONDS = 2700.0
"""In which models must have loaded: the first answer may take an hour (`core/relay.py`, DEFAULT_DEADLINE_SECONDS)."""

SPARED = 0.2
"""Of a batch's limit, for encoding, the way there and back, and a pass that takes longer than the one before it."""

ROWS = 25_000
"""Rows that are expected in all where nobody says: LMSYS' hidden test."""

MARGIN = 1.25
"""What is expected of rows that are still to come is multiplied with."""

TICK = 0.1
"""Seconds after which the clock is looked at, at the latest."""

SAID = 5
"""Rows that could not be scored that are named."""


_SILENT = Report(lambda line: None, lambda name, done, total: None)
"""A plan for each of thousands of batches would bury the log."""


class Server:
    """Models that stay, and answer for one batch of rows after the other. One caller at a time.

    Args:
        members: bundles, or the YAML file of an ensemble.
        base: folder of the base model on this machine.
        seconds: from now on, for all rows. Rows that come later have the prior.
        overrides: `key=value` for settings under `predict`, `model.dtype` and `model.attention`.
        rows: expected in all. Where the time would not suffice for both orders of so many, rows get one.
        batch_seconds: limit for a batch; the first may take longer, as it waits for the models.
        strict: raise if no model can be loaded; otherwise all rows have the prior.
        trust: what is permitted in this process from now on; None: what was before.
        clock: seconds; the workers time their passes by it too, so it can be sent to them.

    Raises:
        BundleError, ConfigError: as `open_ensemble`; or a member is for a part of the rows alone.
        ModelError: the models don't fit into the memory together.
    """

    def __init__(
        self,
        members: Sequence[Path],
        *,
        base: Path | None = None,
        seconds: float,
        overrides: Sequence[str] = (),
        rows: int = ROWS,
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
        placement = _placed(self._ensemble)
        if not placement.gpu:
            warm_up()
        several, settings = len(self._ensemble.members), self._ensemble.members[0].config.predict
        # Between passes a process keeps what its last one needed, and the others can't have it.
        self._budget = max(1, token_budget(settings.tokens_per_batch, gpu=placement.gpu) // several)
        self._swap = settings.swap
        self._stations = [_Station(one, placement, overrides, self._budget, clock) for one in self._ensemble.members]
        # Kaggle wants to hear of us within a quarter of an hour, and 18 GB take minutes to hash.
        pool = ThreadPoolExecutor(1)
        self._proofs = [pool.submit(open_bundle, one.folder) for one in self._ensemble.members]
        pool.shutdown(wait=False)
        self._works = 0
        self._counts: Counter[str] = Counter(dict.fromkeys(("rows", "both", "one", "priors", "failed", "batches"), 0))
        self._spent = 0.0
        self._lost: set[str] = set()
        console.print(f"serving {several} model(s): {placement.why}; {spoken(seconds)} for {rows:,} rows")

    def close(self) -> None:
        """End the workers."""
        for station in self._stations:
            station.crew.close()

    def report(self) -> dict[str, float]:
        """Rows so far: scored in `both` orders, in `one`, by nobody (`priors`); `failed` of them could not be scored;
        batches, and the seconds that they took."""
        return {**self._counts, "seconds": self._spent}

    def predict(self, test: Any, *others: Any) -> pl.DataFrame:
        """Score a batch.

        Args:
            test: a polars or pandas DataFrame with the task's columns and `id`.
            others: what the competition hands over besides. Where one is the sample submission of these rows, the
                answer has its ids, order and columns.

        Returns:
            `id`, of the type that it came in, and a column a class, or that of labels; a row for each that was given.

        Raises:
            DataError: a column is missing, or the sample has other ids.
            BundleError: a file of a bundle is not as it was saved.
            PairclfError: with `strict`, no model can be loaded.
        """
        began = self._clock()
        given, task = in_memory(test), self._ensemble.task
        if "id" not in given.columns:
            raise DataError(f"a batch has columns {given.columns}, and no id", remedy="hand over the test rows first")
        sample = self._sample(others)
        probabilities, orders = self._score(given) if len(given) else self._priors(0)
        self._counts.update(rows=len(given), batches=1, both=int((orders > 1).sum()), one=int((orders == 1).sum()))
        self._counts.update(priors=int((orders == 0).sum()))
        self._spent += self._clock() - began
        return answer(given["id"], probabilities, task, sample)

    def _sample(self, others: Sequence[Any]) -> pl.DataFrame | None:
        """The first of them that has a submission's columns."""
        tables = (one for one in others if hasattr(one, "columns") and can_fill(list(one.columns), self._ensemble.task))
        found = next(tables, None)
        return None if found is None else in_memory(found)

    def _priors(self, rows: int) -> tuple[Floats, Ints]:
        """What `_score` gives rows that nobody scores."""
        return np.tile(self._ensemble.prior, (rows, 1)), np.zeros(rows, dtype=np.int64)

    def _score(self, given: pl.DataFrame) -> tuple[Floats, Ints]:
        """Probabilities `(N, C)`, and how many orders stand behind each row."""
        self._begin()
        began = self._clock()
        inputs = self._encode(given)
        stop, swap = self._plan(inputs, began)
        if stop <= self._clock():
            return self._priors(len(given))
        try:
            outcome = self._conduct(inputs, stop, swap)
        except PairclfError as error:
            if self._strict:
                raise
            self._lose("all models", str(error))
            return self._priors(len(given))
        self._tell(given["id"], outcome)
        return outcome.standing.probabilities(), outcome.standing.orders()

    def _begin(self) -> None:
        """Wait for proofs and models, where this is the first batch with a row."""
        if not self._proofs:
            return
        for proof in self._proofs:
            proof.result()
        self._proofs = []
        until = min(self._clock() + FIRST_SECONDS, self._end)
        for station in self._stations:
            while not station.settled and self._clock() < until:
                station.wait(TICK)

    def _encode(self, given: pl.DataFrame) -> list[Inputs]:
        """Each member's sequences, laid on its shelf; members with one recipe have them once."""
        made: dict[str, tuple[list[tuple[Encoded, ...]], Inputs]] = {}
        for station in self._stations:
            if station.recipe not in made:
                task, rules = self._ensemble.task, station.member.config.data.rules
                frame, _ = clean(rows_in_memory(given, task), task, rules, labelled=False)
                encoded = station.builder.encode(to_rows(frame, task))
                made[station.recipe] = encoded, look_at(encoded)
            station.shelf[:] = made[station.recipe][0]
        return [made[station.recipe][1] for station in self._stations]

    def _plan(self, inputs: Sequence[Inputs], began: float) -> tuple[float, str]:
        """Clock time at which this batch's scoring ends, and `predict.swap` for it.

        If the time that is left suffices for both orders of all rows that are expected, by what rows took so far, the
        end is the batch's limit, or that of all time. Otherwise its rows have one order, and of several models as many
        as its part of the time suffices for, the first one at least. What they leave of it is the later batches', which
        may have both orders again.
        """
        hard = min(began + (1 - SPARED) * self._batch_seconds, self._end)
        rows, served = len(inputs[0].lengths), self._counts["rows"]
        expected = mean = 0.0
        for member, (station, mine) in enumerate(zip(self._stations, inputs, strict=True)):
            load = station.meet(mine, orders_of(self._swap, member, mine), self._budget)
            if station.known:  # others were never heard of, or are lost
                expected += station.seconds(load)
                mean += station.seconds(station.total) / (served + rows)
        left, to_come = self._end - began, max(self._rows - served, served // 10, rows)
        short = MARGIN * mean * to_come / max(left, 1e-9)
        if short <= 1:
            return hard, self._swap
        swap = "split" if self._swap == "split" else "off"
        if len(self._stations) == 1:  # one order is all there is: no other model could take more than the batch's part
            return hard, swap
        fair = expected / short
        first = self._stations[0].seconds(
            self._stations[0].load(inputs[0], orders_of(swap, 0, inputs[0]), self._budget)
        )
        return min(hard, began + max(fair, MARGIN * first)), swap

    def _conduct(self, inputs: Sequence[Inputs], stop: float, swap: str) -> Outcome:
        parts = [station.part(mine) for station, mine in zip(self._stations, inputs, strict=True)]
        crew, nowhere = _BatchCrew(self._stations, self._works), Nowhere()
        conductor = Conductor(
            parts,
            self._ensemble.task,
            self._ensemble,
            crew=crew,
            clock=self._clock,
            journal=nowhere,
            sink=nowhere,
            report=_SILENT,
            swap=swap,
            budget=self._budget,
            stop=stop,
        )
        try:
            outcome = conductor.run(asked=lambda: 0, tick=TICK)
        finally:
            self._works = crew.next_number
        for station, pace in zip(self._stations, conductor.agenda.paces, strict=True):
            if pace.known:
                station.speed, station.known = pace.speed, True
        return outcome

    def _tell(self, ids: pl.Series, outcome: Outcome) -> None:
        for name, why in outcome.lost.items():
            self._lose(name, why)
        for row, why in {row: why for one in outcome.standing.failed for (row, _), why in one.items()}.items():
            self._counts["failed"] += 1
            if self._counts["failed"] <= SAID:
                console.print(f"row {ids[row]} could not be scored: {why}")

    def _lose(self, name: str, why: str) -> None:
        """Say it loudly, and once."""
        if name not in self._lost:
            self._lost.add(name)
            console.print(f"WARNING: {name} can't be used: {why}")


def _check_shares(ensemble: Ensemble) -> None:
    """Refuse cascades: which of all rows are the most uncertain shows when all have come."""
    for place, member in enumerate(ensemble.members):
        if member.share < 1:
            raise ConfigError(
                f"members.{place}.share={member.share:g} asks for the most uncertain of all rows, and they come in "
                "batches",
                remedy="set share: 1, or package the ensemble as a notebook (package.kernel=notebook)",
            )


def _placed(ensemble: Ensemble) -> Placement:
    """Where all members fit at once.

    Raises:
        ModelError: nowhere.
    """
    size = sum(model_bytes(Bundle(one.folder, one.manifest, one.config), one.base) for one in ensemble.members)
    others = len(ensemble.members) - 1 if torch.cuda.device_count() else 0  # processes, each with a CUDA of its own
    remedy = "serve one bundle, or the folds averaged into one (pairclf merge); or export them quantised"
    try:
        placement = choose(ensemble.members[0].config.predict, size + round(others * HEADROOM[1]))
    except ModelError as error:
        raise ModelError(f"the models must be in memory together: {error.what}", remedy=remedy) from error
    if not placement.gpu:
        copies = len(placement.groups)
        free = memory_to_have(torch.device("cpu"), copies)
        if size > free:
            what = (
                f"the models take {size / 1e9:.1f} GB in each of {copies} process(es), which can have {free / 1e9:.1f}"
            )
            raise ModelError(f"the models must be in memory together: {what}", remedy=remedy)
    return placement


class _Station:
    """A member whose workers stay, what they said last, and what its rows took.

    Attributes:
        shelf: the sequences of the present batch, where the workers' work is taken from.
        total: what all sequences so far would compute in all orders wanted.
        speed: operations a second, as seen in the last batch that had any.
        known: whether there was one.
    """

    def __init__(
        self, member: Member, placement: Placement, overrides: Sequence[str], budget: int, clock: Clock
    ) -> None:
        self.member = member
        self.builder, self.recipe = recipe(member)
        self.shelf: list[tuple[Encoded, ...]] = []
        self.total = Load(0.0, 0.0, 0.0)
        self.speed, self.known = SPEED["cuda" if placement.gpu else "cpu"], False
        self._shape = shape_of(member)
        self._copies = len(placement.groups)
        orders = 2 if member.config.task.swappable else 1
        largest = Largest(self.builder.max_length, budget, orders)
        model = Model(member.folder, member.base, tuple(overrides), self.shelf, largest)
        self.crew = ProcessCrew([model], placement.groups, clock=clock)
        self.workers = list(self.crew.load(0))
        self._said: dict[int, Ready | Failed] = {}
        self._fits = budget
        self._deaths = 0
        self.wait(0.0)  # workers are told what to load when somebody waits for them

    @property
    def settled(self) -> bool:
        """Whether each worker has loaded the model, or will not."""
        return all(worker in self._said for worker in self.workers)

    def wait(self, seconds: float) -> list[Event]:
        """What happened to the workers; what a later batch must hear too is noted."""
        events = self.crew.wait(seconds)
        for event in events:
            if isinstance(event, Ready):
                self._said[event.worker] = event
            elif isinstance(event, Failed) and (event.kind == "died" or event.work is None):
                self._said[event.worker] = event._replace(work=None)
                self._deaths += event.kind == "died"
            elif isinstance(event, Scored):
                self._deaths = 0
        return events

    def lower(self, work: Work) -> None:
        """Memory did not suffice for this work, in this batch: the next one begins with half of its tokens."""
        tokens = sum(len(self.shelf[row][order].ids) for row, order in work.sequences)
        self._fits = max(1, min(self._fits, tokens // 2))

    def news(self) -> list[Event]:
        """What a new batch's conductor is to hear first. Workers that died are started anew by it, but not for ever."""
        found: list[Event] = []
        for said in (self._said[worker] for worker in self.workers if worker in self._said):
            if isinstance(said, Ready):
                found.append(said._replace(budget=min(self._fits, said.budget or self._fits)))
            else:
                found.append(said._replace(kind="error") if self._deaths >= DEATHS else said)
        return found

    def restart(self, worker: int) -> int:
        number = self.crew.restart(worker)
        self.workers = [number if one == worker else one for one in self.workers]
        return number

    # --- what rows take ----------------------------------------------------------------------------------------------

    def part(self, inputs: Inputs) -> Part:
        """The member as a batch is planned: its model is loaded."""
        member = self.member
        return Part(
            name=member.manifest.name,
            inputs=inputs,
            shape=self._shape,
            speed=self.speed,
            load=0.0,
            gain=member.gain_member,
            gain_swap=member.gain_swap,
        )

    def meet(self, inputs: Inputs, orders: Sequence[int], budget: int) -> Load:
        """Add a batch to `total`; what it computes."""
        load = self.load(inputs, orders, budget)
        self.total = Load(*(one + other for one, other in zip(self.total, load, strict=True)))
        return load

    def load(self, inputs: Inputs, orders: Sequence[int], budget: int) -> Load:
        """What these orders of a batch compute."""
        backlog = Backlog(inputs, orders)
        backlog.layout = next((one.layout for one in self._said.values() if isinstance(one, Ready)), backlog.layout)
        return backlog.left(budget)

    def seconds(self, load: Load) -> float:
        """That all workers together are expected to take, by the last batch's speed."""
        return Pace(self._shape, self.speed).seconds(load) / self._copies


class _BatchCrew:
    """A `work.Crew` for one batch, over workers that stay: nobody loads, and what is late is nobody's.

    Args:
        stations: a member each.
        number: of the first work, so that numbers count up over all batches.
    """

    def __init__(self, stations: Sequence[_Station], number: int) -> None:
        self.next_number = number
        self._first = number
        self._stations = stations
        self._at = stations[0]
        self._news: list[Event] = []

    def load(self, member: int) -> Sequence[int]:
        self._at = self._stations[member]
        self._news = self._at.news()
        return list(self._at.workers)

    def restart(self, worker: int) -> int:
        return self._at.restart(worker)

    def submit(self, work: Work) -> None:
        """`member=0`: a station's crew has no other."""
        self._at.crew.submit(work._replace(number=self._first + work.number, member=0))
        self.next_number = max(self.next_number, self._first + work.number + 1)

    def wait(self, seconds: float) -> list[Event]:
        if self._news:
            news, self._news = self._news, []
            return news
        return [self._told(event) for event in self._at.wait(seconds)]

    def _told(self, event: Event) -> Event:
        """With the conductor's own numbers; those of former batches are below 0, and not awaited."""
        if isinstance(event, Ready) or event.work is None:
            return event
        number, member = event.work.number - self._first, self._stations.index(self._at)
        if isinstance(event, Failed) and event.kind == "memory" and number >= 0:
            self._at.lower(event.work)
        return event._replace(work=event.work._replace(number=number, member=member))

    def close(self) -> None:
        for station in self._stations:
            station.crew.forget()
