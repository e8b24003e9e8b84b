"""What a prediction will take, and what a deadline buys, before a GPU is rented or a notebook is submitted.

The rows are tokenised as `predict` would, and the same conductor runs under a simulated clock: on a device's profile,
or at the pace that a sample of the rows was scored at on this machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from pairclf.console import console, table
from pairclf.errors import ConfigError
from pairclf.inference.agenda import Part
from pairclf.inference.backlog import Backlog, Inputs, Load
from pairclf.inference.conduct import Conductor, Nowhere, Outcome, Report
from pairclf.inference.crew import Model, ProcessCrew
from pairclf.inference.deadline import spoken
from pairclf.inference.devices import Gpu, Placement, choose, model_bytes, place
from pairclf.inference.members import Ensemble, Member, open_ensemble
from pairclf.inference.memory import Largest
from pairclf.inference.profiles import PROFILES, Profile
from pairclf.inference.simulate import SimulatedClock, SimulatedCrew
from pairclf.inference.standing import ORDERS, orders_of
from pairclf.inputs.plan import token_budget
from pairclf.jobs.predict import Prepared, part_of, prepare
from pairclf.model.bundle import Bundle

HERE = "here"
SAMPLE = 64
"""Rows that are scored for the pace of this machine."""

SIMULATED = 4000
"""Rows that are conducted; each stands for as many as there are more, and takes as much longer."""

DEQUANTISED = 2.2
"""Bytes moved for each quantised weight in a forward pass: half a byte read, the rest written and read in 16 bits."""

PARTS = (0.25, 0.5, 0.75)
"""Deadlines that are shown where none is given, in parts of what all takes."""


@dataclass(frozen=True, slots=True)
class Bought:
    """What there is time for until a deadline.

    Attributes:
        seconds: of the deadline; infinite: without one.
        used: of it.
        scored: part of the rows, by pass (`fold0 BA`).
        gain: nats a row over the first member in one order, as the members' gains say.
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
    deadlines: Sequence[float] = (),
    base: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Table]:
    """Simulate a prediction without a deadline, and with some.

    Args:
        paths: bundles, or the YAML file of an ensemble.
        data: unlabelled file, whose rows stand for the hidden ones.
        device: a key of `PROFILES`, or `here`: some rows are scored on this machine.
        rows: how many rows there will be; None: those of the file.
        deadlines: in seconds; none: parts of what all takes.
        base: folder of the base model on this machine.
        overrides: as for `predict`.

    Raises:
        ConfigError: there is no such profile.
        ModelError: the model does not fit on the device.
    """
    if device not in (*PROFILES, HERE):
        raise ConfigError(f"--device {device} is unknown", remedy=f"one of {', '.join((*PROFILES, HERE))}")
    ensemble = open_ensemble(paths, base, overrides)
    with tempfile.TemporaryDirectory(prefix="pairclf-") as folder:
        prepared = prepare(ensemble.members, data, Path(folder))
        world = _measured(ensemble, prepared, overrides) if device == HERE else _profiled(ensemble, PROFILES[device])
        inputs = [_stretched(one.inputs, rows or len(one.inputs.shared)) for one in prepared]
    whole = _bought(ensemble, world, inputs, float("inf"))
    limits = sorted(deadlines) or [part * whole.used for part in PARTS]
    bought = [_bought(ensemble, world, inputs, limit) for limit in limits]
    console.print(world.why)
    return [_by_pass(ensemble, world, inputs, whole), _by_deadline(whole, bought)]


def whole(paths: Sequence[Path], data: Path, *, device: str, rows: int, base: Path | None = None) -> float:
    """Seconds that `rows` rows like those of `data` take on a profile's device, every pass of them.

    Raises:
        ModelError: the model does not fit on the device.
    """
    ensemble = open_ensemble(paths, base, ())
    with tempfile.TemporaryDirectory(prefix="pairclf-") as folder:
        prepared = prepare(ensemble.members, data, Path(folder))
        inputs = [_stretched(one.inputs, rows) for one in prepared]
    return _bought(ensemble, _profiled(ensemble, PROFILES[device]), inputs, float("inf")).used


@dataclass(frozen=True, slots=True)
class World:
    """What a simulation runs on.

    Attributes:
        placement: of workers on devices.
        why: where the figures come from, for people.
        seconds: of a forward pass of a member by one worker.
        loads: seconds to load each member.
        layout: that the workers choose.
        budget: tokens of a forward pass.
        parts: the members, as they are planned; their inputs are those of the file.
    """

    placement: Placement
    why: str
    seconds: Callable[[int, Load], float]
    loads: list[float]
    layout: str
    budget: int
    parts: list[Part]


def _profiled(ensemble: Ensemble, profile: Profile) -> World:
    members, settings = ensemble.members, ensemble.members[0].config.predict
    sizes = [_size(member) for member in members]
    gpus = [Gpu(profile.name, profile.memory)] * profile.count
    placement = place(settings.model_copy(update={"devices": []}), max(sizes), gpus)
    parts = [part_of(member, _nothing(), size, placement) for member, size in zip(members, sizes, strict=True)]
    # A worker of several devices has as many batches under way.
    flops = profile.flops * len(placement.groups[0])

    def seconds(member: int, load: Load) -> float:
        shape, quantised = parts[member].shape, members[member].config.model.quantization != "none"
        operations = shape.linear * load.tokens + shape.quadratic * load.squares
        moved = DEQUANTISED * shape.linear / 2 * quantised * load.passes
        return operations / flops + moved / profile.bandwidth

    return World(
        placement=placement,
        why=f"{profile.count} x {profile.name}: {profile.source}",
        seconds=seconds,
        loads=[10.0 + size / profile.read for size in sizes],
        layout="shared" if settings.layout == "auto" else settings.layout,
        budget=token_budget(settings.tokens_per_batch, gpu=True),
        parts=parts,
    )


def _measured(ensemble: Ensemble, prepared: Sequence[Prepared], overrides: Sequence[str]) -> World:
    """Score some rows with each member here, and take its pace."""
    members, settings = ensemble.members, ensemble.members[0].config.predict
    sizes = [_size(member) for member in members]
    placement = choose(settings, max(sizes))
    budget = token_budget(settings.tokens_per_batch, gpu=placement.gpu)
    chosen = [np.linspace(0, len(one.encoded) - 1, min(SAMPLE, len(one.encoded))).astype(int) for one in prepared]
    samples = [[one.encoded[int(row)] for row in rows] for one, rows in zip(prepared, chosen, strict=True)]
    parts = [
        part_of(member, _some(one.inputs, rows), size, placement)
        for member, one, rows, size in zip(members, prepared, chosen, sizes, strict=True)
    ]
    models = [
        Model(member.folder, member.base, tuple(overrides), rows, Largest.of(part.inputs, budget))
        for member, rows, part in zip(members, samples, parts, strict=True)
    ]
    report = Report(console.print, lambda name, done, total: None)
    with closing(ProcessCrew(models, placement.groups)) as crew:
        conductor = Conductor(
            [replace(part, share=1.0) for part in parts], ensemble.task, ensemble, crew=crew, clock=time.monotonic,
            journal=Nowhere(), sink=Nowhere(), report=report, swap=settings.swap, budget=budget,
        )  # fmt: skip
        conductor.run(asked=lambda: 0, tick=1.0)
    agenda = conductor.agenda
    return World(
        placement=placement,
        why=f"{placement.why}; the pace of {SAMPLE} rows scored here",
        seconds=lambda member, load: agenda.paces[member].seconds(load),
        loads=agenda.loads,
        layout=agenda.backlogs[0].layout,
        budget=agenda.budget,
        parts=parts,
    )


def _size(member: Member) -> int:
    return model_bytes(Bundle(member.folder, member.manifest, member.config), member.base)


def _nothing() -> Inputs:
    none = np.zeros((0, 2), dtype=np.int64)
    return Inputs(none, none[:, 0], none)


def _some(inputs: Inputs, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Inputs:
    """Some of the rows, each on its own."""
    lengths = inputs.lengths[rows]
    return Inputs(lengths, inputs.shared[rows], np.arange(lengths.size).reshape(lengths.shape))


def _stretched(inputs: Inputs, rows: int) -> tuple[Inputs, float]:
    """At most `SIMULATED` of the rows, spread over the file, and how many of `rows` each stands for.

    Rows that stand several times for others are others: repeated texts of the file are as rare in it as before.
    """
    there, count = len(inputs.shared), min(rows, SIMULATED)
    chosen = np.linspace(0, there - 1, min(count, there)).astype(np.int64)
    picked = np.resize(chosen, count)
    lengths, orders = inputs.lengths[picked], inputs.lengths.shape[1]
    own = np.arange(lengths.size).reshape(lengths.shape)
    equal = inputs.twin[picked]
    place = {int(row): at for at, row in enumerate(chosen)}
    twin = own.copy()
    for at in range(min(count, there)):
        for order in range(orders):
            row, other = divmod(int(equal[at, order]), orders)
            if row in place and place[row] <= at:
                twin[at, order] = place[row] * orders + other
    return Inputs(lengths, inputs.shared[picked], twin), rows / count


class _Crew(SimulatedCrew):
    """Takes the seconds of a world, so many times longer as each row stands for more."""

    def __init__(self, world: World, times: float, parts: Sequence[Part], clock: SimulatedClock, classes: int) -> None:
        super().__init__(
            parts, clock, workers=len(world.placement.groups), overhead=0.0, layout=world.layout, classes=classes
        )
        self._world = world
        self._times = times

    def seconds(self, member: int, load: Load) -> float:
        return self._times * self._world.seconds(member, load)


def _bought(ensemble: Ensemble, world: World, inputs: Sequence[tuple[Inputs, float]], limit: float) -> Bought:
    clock, times = SimulatedClock(), inputs[0][1]
    parts = [
        replace(part, inputs=one, load=load, speed=part.speed / times)
        for part, (one, _), load in zip(world.parts, inputs, world.loads, strict=True)
    ]
    crew = _Crew(world, times, parts, clock, len(ensemble.task.classes))
    swap = ensemble.members[0].config.predict.swap
    conductor = Conductor(
        parts, ensemble.task, ensemble, crew=crew, clock=clock, journal=Nowhere(), sink=Nowhere(), swap=swap,
        report=Report(lambda text: None, lambda name, done, total: None), budget=world.budget, stop=limit,
    )  # fmt: skip
    outcome = conductor.run(asked=lambda: 0, tick=600.0)
    scored = _scored(outcome, parts, swap)
    return Bought(limit, clock.now, scored, _gain(parts, scored, swap))


def _scored(outcome: Outcome, parts: Sequence[Part], swap: str) -> dict[str, float]:
    """By pass, the part of the rows that have it."""
    found = {}
    for member, part in enumerate(parts):
        known = outcome.standing.known(member)
        for order in orders_of(swap, member, part.inputs):
            found[f"{part.name} {ORDERS[order]}"] = float(known[:, order].mean())
    return found


def _gain(parts: Sequence[Part], scored: dict[str, float], swap: str) -> float:
    total = 0.0
    for member, part in enumerate(parts):
        names = [f"{part.name} {ORDERS[order]}" for order in orders_of(swap, member, part.inputs)]
        shares = [scored[name] for name in names if name in scored]
        total += (part.gain * shares[0] if member else 0.0) + (part.gain_swap * shares[1] if len(shares) > 1 else 0.0)
    return total


def _by_pass(ensemble: Ensemble, world: World, inputs: Sequence[tuple[Inputs, float]], whole: Bought) -> Table:
    (one, times), swap = inputs[0], ensemble.members[0].config.predict.swap
    rows = round(times * len(one.shared))
    made = table(
        f"Forecast of {rows:,} rows, {times * float(one.lengths.sum()) / 1e6:,.1f} M tokens in both orders", "", ""
    )
    made.add_row("devices", world.placement.why)
    made.add_row("forward passes of", f"{world.budget:,} tokens, {world.layout}")
    for number, member in enumerate(ensemble.members):
        name, orders = member.manifest.name, orders_of(swap, number, inputs[number][0])
        made.add_row(f"loading {name}", spoken(world.loads[number]))
        backlog = Backlog(inputs[number][0], orders)
        backlog.layout = world.layout
        first = member.share * _seconds(world, number, backlog, 1, times)
        both = member.share * _seconds(world, number, backlog, None, times)
        made.add_row(f"{name}, {ORDERS[orders[0]]}", spoken(first))
        if backlog.rows(2).any():
            made.add_row(f"{name}, {ORDERS[orders[1]]} together with it", spoken(both - first))
    made.add_row("all of it, without a deadline", spoken(whole.used))
    made.add_row("with 35% to spare, which a notebook should have", spoken(1.35 * whole.used))
    return made


def _seconds(world: World, member: int, backlog: Backlog, rank: int | None, times: float) -> float:
    """Of all forward passes of a rank, or of both at once, by all workers."""
    return times * world.seconds(member, backlog.left(world.budget, rank)) / len(world.placement.groups)


def _by_deadline(whole: Bought, bought: Sequence[Bought]) -> Table:
    made = table("What a deadline buys", "deadline", "used", *whole.scored, "log loss lower by")
    for one in (*bought, whole):
        limit = "none" if one.seconds == float("inf") else spoken(one.seconds)
        made.add_row(limit, spoken(one.used), *(f"{part:.0%}" for part in one.scored.values()), f"{one.gain:.4f}")
    made.caption = (
        "rows that have each pass (AB: the order of the file, BA: sides exchanged); the log loss is a guess, over the "
        "first model in one order, by what bundles measured or the ensemble's file says"
    )
    made.caption_justify = "left"
    return made
