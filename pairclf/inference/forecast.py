"""Forecast the duration of a prediction, and what a deadline leaves out, without a GPU.

The rows are tokenised as in `predict`, and the same event loop runs on a simulated clock: at the speed of a device
profile, or at the speed measured on this machine for a sample of the rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from pairclf.approaches import approach_of
from pairclf.approaches.protocol import Prepared
from pairclf.console import console, counted, table
from pairclf.errors import ConfigError
from pairclf.hardware import PROFILES, Profile
from pairclf.inference.deadline import format_duration, seconds_until
from pairclf.inference.devices import Gpu, Placement, place
from pairclf.inference.ensemble import Ensemble, open_ensemble
from pairclf.inference.loop import PredictionLoop, PredictionResult, ProgressReporter
from pairclf.inference.pending import PendingSequences, Workload
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import ProcessPool
from pairclf.inference.prepare import costs_of, placement_of, planned_model_of, prepare, worker_model_of
from pairclf.inference.simulate import SimulatedClock, SimulatedPool
from pairclf.inference.state import ORDERS_HINT, orders_of, pass_name
from pairclf.inputs.cache import RowSource
from pairclf.inputs.plan import CHEAPEST, token_budget
from pairclf.inputs.sequences import LargestPass, SequenceIndex
from pairclf.run import unlabelled

THIS_MACHINE = "here"
SAMPLE_ROWS = 64
"""Rows that are scored to measure this machine."""

MAX_SIMULATED_ROWS = 4000
"""Rows that are simulated at most. With more rows, each simulated row stands for several, and takes as much longer."""

SPARE = 1.35
"""A notebook should have this many times the forecast: a hot T4 is slower."""

DEADLINE_SHARES = (0.25, 0.5, 0.75)
"""Default deadlines, as shares of the duration without a deadline."""


@dataclass(frozen=True, slots=True)
class DeadlineResult:
    """A simulated run with a deadline.

    Attributes:
        seconds: the deadline; infinite: none.
        used: duration of the run.
        scored: share of rows scored, by pass (`fold0 BA`).
        gain: expected gain over the first model in one order, in nats a row.
    """

    seconds: float
    used: float
    scored: dict[str, float]
    gain: float


def forecast(
    paths: Sequence[Path],
    data: Path,
    *,
    device: str,
    rows: int | None = None,
    deadlines: Sequence[str] = (),
    base: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Table]:
    """Simulate a prediction without a deadline, and with some.

    Args:
        paths: bundles, or the YAML file of an ensemble.
        data: unlabelled file with rows like the hidden ones.
        device: a key of `PROFILES`, or `here`: this machine is measured on a sample of rows.
        rows: number of rows to be scored; None: as many as in the file.
        deadlines: in seconds; empty: shares of the duration without a deadline.
        base: folder of the base model on this machine.
        overrides: as for `predict`.

    Raises:
        ConfigError: there is no such profile, or a deadline is neither a duration nor a time.
        ModelError: the model does not fit on the device.
    """
    if device not in (*PROFILES, THIS_MACHINE):
        raise ConfigError(f"--device {device} is unknown", remedy=f"one of {', '.join((*PROFILES, THIS_MACHINE))}")
    limits = sorted(seconds_until(text, datetime.now(UTC)) for text in deadlines)
    ensemble = open_ensemble(paths, base, overrides)
    with tempfile.TemporaryDirectory(prefix="pairclf-") as folder:
        prepared = _prepared(ensemble, data, Path(folder))
        setup = (
            _setup_of_this_machine(ensemble, prepared, overrides)
            if device == THIS_MACHINE
            else _setup_of_profile(ensemble, PROFILES[device])
        )
        inputs = [_resized_index(rows_of.inputs, rows or len(rows_of.inputs.shared)) for rows_of in prepared]
    unlimited = _simulate(ensemble, setup, inputs, float("inf"))
    limits = limits or [share * unlimited.used for share in DEADLINE_SHARES]
    results = [_simulate(ensemble, setup, inputs, limit) for limit in limits]
    console.print(setup.why)
    return [_by_pass(ensemble, setup, inputs, unlimited), _by_deadline(ensemble, unlimited, results)]


def total_seconds(paths: Sequence[Path], data: Path, *, device: str, rows: int, base: Path | None = None) -> float:
    """Seconds for all passes over `rows` rows like those of `data`, on a profile's device.

    Raises:
        ModelError: the model does not fit on the device.
    """
    ensemble = open_ensemble(paths, base, ())
    with tempfile.TemporaryDirectory(prefix="pairclf-") as folder:
        prepared = _prepared(ensemble, data, Path(folder))
        inputs = [_resized_index(rows_of.inputs, rows) for rows_of in prepared]
    return _simulate(ensemble, _setup_of_profile(ensemble, PROFILES[device]), inputs, float("inf")).used


class PassSeconds(NamedTuple):
    """Seconds of one model for all rows: to load it, for the first order, and for the second one after it."""

    load: float
    first: float
    second: float


def pass_seconds(bundle: Path, data: Path, *, device: str, rows: int, base: Path | None = None) -> PassSeconds:
    """What a bundle takes for `rows` rows like those of `data`, on a profile's device.

    Raises:
        ConfigError: there is no such profile.
        ModelError: the model does not fit on the device.
    """
    if device not in PROFILES:
        raise ConfigError(f"--device {device} is unknown", remedy=f"one of {', '.join(PROFILES)}")
    ensemble = open_ensemble([bundle], base, ())
    with tempfile.TemporaryDirectory(prefix="pairclf-") as folder:
        index, repeats = _resized_index(_prepared(ensemble, data, Path(folder))[0].inputs, rows)
    setup = _setup_of_profile(ensemble, PROFILES[device])
    pending = PendingSequences(index, orders_of(ensemble.settings.swap, 0, index))
    pending.layout = setup.layout
    first, second = (_seconds(setup, 0, pending, rank, repeats) for rank in (1, 2))
    return PassSeconds(setup.load_seconds[0], first, second)


def _prepared(ensemble: Ensemble, data: Path, folder: Path) -> list[Prepared]:
    """The rows as each model sees them."""
    return prepare(
        ensemble.members,
        lambda member, recipe: RowSource.of(unlabelled(member.bundle.config, data), ensemble.task.fields),
        folder,
    )


@dataclass(frozen=True, slots=True)
class SimulationSetup:
    """The simulated hardware and models.

    Attributes:
        placement: workers and their devices.
        why: source of the figures, for messages.
        seconds: seconds of a forward pass, by model and workload, of one worker.
        load_seconds: seconds to load each model.
        layout: batch layout of the workers.
        budget: token budget of a forward pass.
        models: the models; their inputs are replaced for each simulation.
    """

    placement: Placement
    why: str
    seconds: Callable[[int, Workload], float]
    load_seconds: list[float]
    layout: str
    budget: int
    models: list[PlannedModel]


def _setup_of_profile(ensemble: Ensemble, profile: Profile) -> SimulationSetup:
    members, settings = ensemble.members, ensemble.settings
    costs = costs_of(members)
    gpus = [Gpu(profile.name, profile.memory)] * profile.count
    placement = place(settings.model_copy(update={"devices": []}), max(cost.bytes for cost in costs), gpus)
    models = [
        planned_model_of(member, SequenceIndex.empty(), cost, placement)
        for member, cost in zip(members, costs, strict=True)
    ]
    # A worker on several devices runs as many batches at once.
    flops = profile.flops * len(placement.groups[0])

    def seconds(member: int, workload: Workload) -> float:
        cost = costs[member]
        operations = cost.linear * workload.tokens + cost.quadratic * workload.squares
        speed = flops if "cuda" in cost.speed else cost.speed["cpu"]
        return operations / speed + workload.passes * max(cost.moved / profile.bandwidth, cost.launched)

    return SimulationSetup(
        placement=placement,
        why=f"{profile.count} x {profile.name}: {profile.source}",
        seconds=seconds,
        load_seconds=[10.0 + cost.bytes / profile.read for cost in costs],
        layout=CHEAPEST if settings.layout == "auto" else settings.layout,
        budget=token_budget(settings.tokens_per_batch, gpu=True),
        models=models,
    )


def _setup_of_this_machine(
    ensemble: Ensemble, prepared: Sequence[Prepared], overrides: Sequence[str]
) -> SimulationSetup:
    """Measure each model on a sample of rows on this machine."""
    members, settings = ensemble.members, ensemble.settings
    costs = costs_of(members)
    placement = placement_of(ensemble, max(cost.bytes for cost in costs))
    budget = token_budget(settings.tokens_per_batch, gpu=placement.gpu)
    planned, worker_models = [], []
    for member, file, cost in zip(members, prepared, costs, strict=True):
        rows = np.linspace(0, len(file.encoded) - 1, min(SAMPLE_ROWS, len(file.encoded))).astype(int)
        index = file.inputs.of_rows(rows)
        planned.append(planned_model_of(member, index, cost, placement))
        encoded = [file.encoded[int(row)] for row in rows]
        worker_models.append(worker_model_of(member, encoded, overrides, LargestPass.of(index, budget)))
    with closing(ProcessPool(worker_models, placement.groups)) as pool:
        loop = PredictionLoop(
            [replace(model, share=1.0) for model in planned],
            ensemble.task,
            ensemble,
            pool=pool,
            clock=time.monotonic,
            swap=settings.swap,
            budget=budget,
            reporter=ProgressReporter(console.print),
        )
        loop.run(tick=1.0)
    planner = loop.planner
    return SimulationSetup(
        placement=placement,
        why=f"{placement.why}; measured on {SAMPLE_ROWS} rows",
        seconds=lambda member, workload: planner.throughput_by_model[member].seconds(workload),
        load_seconds=planner.load_seconds,
        layout=planner.pending_by_model[0].layout,
        budget=planner.budget,
        models=planned,
    )


def _resized_index(inputs: SequenceIndex, rows: int) -> tuple[SequenceIndex, float]:
    """At most `MAX_SIMULATED_ROWS` rows, spread over the file, and how many of `rows` each stands for.

    If the file has fewer rows, they are repeated. Repetitions don't count as duplicates, so that the share of
    duplicates stays that of the file.
    """
    file_rows, count = len(inputs.shared), min(rows, MAX_SIMULATED_ROWS)
    chosen = np.linspace(0, file_rows - 1, min(count, file_rows)).astype(np.int64)
    picked = np.resize(chosen, count)
    lengths, orders = inputs.lengths[picked], inputs.lengths.shape[1]
    own_index = np.arange(lengths.size).reshape(lengths.shape)
    original = inputs.duplicate_of[picked]
    position_of = {int(row): position for position, row in enumerate(chosen)}
    duplicate_of = own_index.copy()
    for position in range(min(count, file_rows)):
        for order in range(orders):
            row, other = divmod(int(original[position, order]), orders)
            if row in position_of and position_of[row] <= position:
                duplicate_of[position, order] = position_of[row] * orders + other
    return inputs.of_rows(picked, duplicate_of), rows / count


class _ForecastPool(SimulatedPool):
    """Workers whose passes take the setup's seconds, times the rows that each simulated row stands for."""

    def __init__(
        self,
        setup: SimulationSetup,
        repeats: float,
        models: Sequence[PlannedModel],
        clock: SimulatedClock,
        classes: int,
    ) -> None:
        super().__init__(
            models, clock, workers=len(setup.placement.groups), overhead=0.0, layout=setup.layout, classes=classes
        )
        self._setup = setup
        self._repeats = repeats

    def seconds(self, member: int, workload: Workload) -> float:
        return self._repeats * self._setup.seconds(member, workload)


def _simulate(
    ensemble: Ensemble, setup: SimulationSetup, inputs: Sequence[tuple[SequenceIndex, float]], limit: float
) -> DeadlineResult:
    clock, repeats = SimulatedClock(), inputs[0][1]
    models = [
        replace(model, inputs=index, load_seconds=load_seconds, speed=model.speed / repeats)
        for model, (index, _), load_seconds in zip(setup.models, inputs, setup.load_seconds, strict=True)
    ]
    pool = _ForecastPool(setup, repeats, models, clock, len(ensemble.task.classes))
    swap = ensemble.settings.swap
    loop = PredictionLoop(
        models, ensemble.task, ensemble, pool=pool, clock=clock, swap=swap, budget=setup.budget, stop=limit
    )
    result = loop.run(tick=600.0)
    scored = _scored_shares(result, models, swap)
    return DeadlineResult(limit, clock.now, scored, _gain(models, scored, swap))


def _scored_shares(result: PredictionResult, models: Sequence[PlannedModel], swap: str) -> dict[str, float]:
    """Share of rows scored, by pass."""
    shares = {}
    for member, model in enumerate(models):
        is_scored = result.state.is_scored(member)
        for order in orders_of(swap, member, model.inputs, model.swap_share):
            shares[pass_name(model.name, order, is_scored.shape[1])] = float(is_scored[:, order].mean())
    return shares


def _gain(models: Sequence[PlannedModel], scored: dict[str, float], swap: str) -> float:
    total = 0.0
    for member, model in enumerate(models):
        orders = model.inputs.lengths.shape[1]
        used = orders_of(swap, member, model.inputs, model.swap_share)
        names = [pass_name(model.name, order, orders) for order in used]
        # Duplicates of a chosen row are scored with it: more than the share may be.
        done = [
            min(1.0, scored[name] / wanted)
            for name, wanted in zip(names, (model.share, model.share * model.swap_share), strict=False)
        ]
        total += (model.gain * done[0] if member else 0.0) + (model.gain_swap * done[1] if len(done) > 1 else 0.0)
    return total


def _by_pass(
    ensemble: Ensemble, setup: SimulationSetup, inputs: Sequence[tuple[SequenceIndex, float]], unlimited: DeadlineResult
) -> Table:
    (index, repeats), swap = inputs[0], ensemble.settings.swap
    rows, tokens = round(repeats * len(index.shared)), repeats * float(index.lengths.sum())
    unit = approach_of(ensemble.members[0].bundle.config).unit
    both_orders = " in both orders" if index.lengths.shape[1] > 1 else ""
    report = table(f"Forecast of {counted(rows, 'row')}, {tokens / 1e6:,.1f} M {unit}{both_orders}", "", "")
    report.add_row("devices", setup.placement.why)
    report.add_row("forward passes of", f"{setup.budget:,} {unit}, {setup.layout}")
    if most := max(rows_of.rationale for rows_of, _ in inputs):
        report.add_row("a rationale before each label", f"at most {most:,} tokens, a forward pass of a batch each")
    for number, member in enumerate(ensemble.members):
        name, orders = member.name, orders_of(swap, number, inputs[number][0], member.swap_share)
        report.add_row(f"loading {name}", format_duration(setup.load_seconds[number]))
        pending = PendingSequences(inputs[number][0], orders)
        pending.layout = setup.layout
        first = member.share * _seconds(setup, number, pending, 1, repeats)
        both = member.share * _seconds(setup, number, pending, None, repeats)
        second = both - first
        if member.swap_share < 1:  # chosen after all first orders, and so not together with them
            second = member.share * member.swap_share * _seconds(setup, number, pending, 2, repeats)
        report.add_row(pass_name(name, orders[0], index.lengths.shape[1]), format_duration(first))
        if pending.rows_left(2).any():
            how = "together with it" if member.swap_share == 1 else f"of {member.swap_share:.0%} of these rows"
            report.add_row(f"{pass_name(name, orders[1], 2)} {how}", format_duration(second))
    report.add_row("total, without a deadline", format_duration(unlimited.used))
    spare = f"with {SPARE - 1:.0%} to spare, which a notebook should have"
    report.add_row(spare, format_duration(SPARE * unlimited.used))
    return report


def _seconds(setup: SimulationSetup, member: int, pending: PendingSequences, rank: int | None, repeats: float) -> float:
    """Seconds of all passes of a rank, or of both orders together, by all workers."""
    return repeats * setup.seconds(member, pending.workload_left(setup.budget, rank)) / len(setup.placement.groups)


def _by_deadline(ensemble: Ensemble, unlimited: DeadlineResult, results: Sequence[DeadlineResult]) -> Table:
    columns = [*results, unlimited]  # a row for each pass: an ensemble has more passes than 80 columns can hold
    limits = ["none" if column.seconds == float("inf") else format_duration(column.seconds) for column in columns]
    report = table("What a deadline buys", "deadline", *limits)
    report.add_row("used", *(format_duration(column.used) for column in columns))
    for scored in unlimited.scored:
        report.add_row(scored, *(f"{column.scored[scored]:.0%}" for column in columns))
    report.add_row("log loss lower by", *(f"{column.gain:.4f}" for column in columns))
    hint, one_order = (f" ({ORDERS_HINT})", " in one order") if ensemble.orders > 1 else ("", "")
    report.caption = (
        f"rows that have each pass{hint}; the log loss is a guess, over the first model{one_order}, by what bundles "
        "measured or the ensemble's file says"
    )
    report.caption_justify = "left"
    return report
