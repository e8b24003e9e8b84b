"""Training on a CPU that other processes use too: what OpenMP's settings cost when it is free, and when it is not.

    python benchmarks/busy.py [--steps 1] [--repetitions 5] [--loops 3] [--patience 60] [--quick] [--idle | --start]

Each arm is an environment in which a process trains the embedded Gemma-2 on the synthetic arena, NF4 QLoRA as
`configs/demo/gemma2-tiny.yaml` has it. In every repetition each arm takes its steps once beside nothing and once beside
`--loops` processes that compute without end, in an order that changes; an arm that waits for its turn computes nothing.

`default` is libgomp's own: a thread spins for milliseconds at a barrier before it sleeps. `default_again` is the same
once more, for how much two figures differ by chance. A job of `t` threads on `c` cores beside `n` loops has its fair
share if it takes `(t + n) / c` times as long as beside nothing (or as long, if that is below 1).

Other processes of the machine disturb the figures: before each turn up to `--patience` seconds are waited for a moment
in which they leave the machine alone, and `others` is how many cores they used during the turns. `best_wall` compares
the least disturbed turns beside nothing: with `--rows-per-step 1` and many repetitions some are short enough to be
disturbed by nobody. The other ratios are medians over repetitions of ratios within one, with their quartiles. The last
line is one JSON object.

`--idle` takes turns beside nothing alone, so that more repetitions fit into the time: a setting costs something where
the quartiles of its `free` ratios lie above those of `default_again`.

`--start` measures how a worker of a prediction starts, without a model: in a new interpreter (`spawn`, as with CUDA);
from the fork server right after it was started, which imports meanwhile (`first`); and from one that has imported
(`later`), as `predict` starts it before it hashes and tokenises.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from pairclf.config import load_config
from pairclf.own_files import shipped

CPU, WALL = 0, 1  # of a turn
CONFIG = "configs/demo/gemma2-tiny.yaml"
ROWS = 512
APPROACH = "pairclf.approaches.torch_models"
STARTS = ("spawn", "first", "later")
ARMS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin_1000": {"GOMP_SPINCOUNT": "1000"},
    "spin_2000": {"GOMP_SPINCOUNT": "2000"},
    "spin_4000": {"GOMP_SPINCOUNT": "4000"},
    "spin_10000": {"GOMP_SPINCOUNT": "10000"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
    "default_again": {},
}
QUIET = 0.2
"""Cores in use below which the machine counts as free."""
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


class Taken(NamedTuple):
    """Seconds of an arm's turn, and how many cores processes used that are not of this benchmark."""

    cpu: float
    wall: float
    others: float = 0.0


# --- processes -------------------------------------------------------------------------------------------------------


def work(pipe: Connection, rows_per_step: int) -> None:
    """An arm's process: takes numbers of steps until it gets None; answers what they took."""
    from pairclf.approaches.finetune.distributed import make_accelerator
    from pairclf.approaches.finetune.step import accumulate, make_examples, optimizer_step
    from pairclf.approaches.finetune.train import construct
    from pairclf.demo.arena import generate
    from pairclf.model.engine import build
    from pairclf.model.inputs import open_inputs
    from pairclf.task import LMSYS, Row

    config, _, builder, _ = open_inputs(load_config(shipped(CONFIG), [f"train.global_batch_size={rows_per_step}"]))
    rows = [
        Row(
            row.id,
            {name: getattr(row, name) for name in LMSYS.fields},
            tuple(float(place == row.label) for place in range(3)),
        )
        for row in generate(ROWS, seed=config.seed).rows
    ]
    accelerator = make_accelerator(config)
    classifier = build(config, accelerator.device)
    learner = construct(config, make_examples(rows, builder.encode(rows), config), classifier, accelerator)
    classifier.train()
    pipe.send("ready")
    step = 0
    while (count := pipe.recv()) is not None:
        start = Taken(time.process_time(), time.perf_counter())
        for members in steps_from(step, count, rows_per_step):
            step += 1
            outcome = accumulate(learner, members, step)
            assert outcome is not None
            optimizer_step(learner, config.train.max_grad_norm, outcome.loss)
        pipe.send(Taken(time.process_time() - start.cpu, time.perf_counter() - start.wall))


def steps_from(first: int, count: int, rows_per_step: int) -> Iterator[Any]:
    """The rows of so many steps; those of all arms are the same."""
    import numpy as np

    for step in range(first, first + count):
        yield np.random.default_rng(step).permutation(ROWS)[:rows_per_step]


def loop(ready: Connection) -> None:
    """Compute until the process is killed, or its parent has ended."""
    parent = os.getppid()
    ready.send("ready")
    while os.getppid() == parent:
        sum(range(100_000))


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """What processes that start meanwhile inherit: OpenMP reads it as it is loaded."""
    before = dict(os.environ)
    for name in SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def loops(count: int) -> Iterator[list[int]]:
    """So many processes that compute without end, while it lasts; yields their ids."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    running = [context.Process(target=loop, args=(theirs,), daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    for _ in running:
        ours.recv()
    try:
        yield [process.pid for process in running if process.pid is not None]
    finally:
        for process in running:
            process.kill()
            process.join()


def seconds_of(processes: Sequence[int]) -> float:
    """CPU seconds that these have used so far."""
    stats = [
        Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split() for process in processes
    ]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """CPU seconds that all processes of the machine have used so far."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _waiting, irq, softirq, _steal = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def wait_for_peace(patience: float) -> None:
    """Return when the machine has done next to nothing for half a second, or after so many seconds."""
    end = time.perf_counter() + patience
    while time.perf_counter() < end:
        before, start = machine_seconds(), time.perf_counter()
        time.sleep(0.5)
        if machine_seconds() - before < QUIET * (time.perf_counter() - start):
            return


# --- measurements ----------------------------------------------------------------------------------------------------

Figures = dict[str, dict[str, list[Taken]]]
"""By arm and by state of the machine, a figure a repetition."""


def turn(pipe: Connection, options: argparse.Namespace, count: int) -> Taken:
    """An arm's steps beside so many loops."""
    wait_for_peace(options.patience)
    with loops(count) as running:
        before = machine_seconds() - seconds_of(running)
        pipe.send(options.steps)
        taken: Taken = pipe.recv()
        others = machine_seconds() - seconds_of(running) - before - taken.cpu
    return taken._replace(others=max(0.0, others) / taken.wall)


def measure(options: argparse.Namespace) -> Figures:
    """What each arm took."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    for name, settings in ARMS.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, options.rows_per_step), daemon=True)
        with environment(settings):
            process.start()
        theirs.close()  # so that `recv` fails if the process dies
        workers[name] = process, ours
        assert ours.recv() == "ready"
        ours.send(1)  # warms up
        ours.recv()
    states = {"free": 0} if options.idle else {"free": 0, "busy": options.loops}
    figures: Figures = {name: {state: [] for state in states} for name in ARMS}
    names = list(ARMS)
    for repetition in range(options.repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            for state, count in states.items():
                taken = turn(workers[name][1], options, count)
                figures[name][state].append(taken)
                print(
                    f"{repetition} {name:13s} {state}: {taken.cpu:6.2f} CPU-s {taken.wall:6.2f} s, "
                    f"others {taken.others:.1f} cores",
                    flush=True,
                )
    for process, pipe in workers.values():
        pipe.send(None)
        process.join()
    return figures


def ratio(one: Sequence[Taken], other: Sequence[Taken], clock: int) -> list[float]:
    """First quartile, median and third quartile of the ratios within a repetition."""
    ratios = [x[clock] / y[clock] for x, y in zip(one, other, strict=True)]
    return [round(value, 3) for value in (quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios)]


# --- how workers start -----------------------------------------------------------------------------------------------


def load_nothing(assignment: Any) -> Any:
    """Stands in for `load_bundle`: what is measured is all that comes before it, imports among it."""
    from pairclf.approaches.protocol import Loaded

    import_module(APPROACH)
    return Loaded(None, "padded", "nothing")  # type: ignore[arg-type]


def started(method: str) -> Taken:
    """What it takes until a worker could load its model; the CPU seconds are those of all processes below this one."""
    from pairclf.inference import pool as pools
    from pairclf.inputs.sequences import LargestPass

    before, start = children_seconds(), time.perf_counter()
    if method == "spawn":
        pools.warm_up = lambda modules: False
    model = pools.WorkerModel(APPROACH, Path(), None, (), [], LargestPass(1, 1, 1))
    pool = pools.ProcessPool([model], [("cpu",)], load=load_nothing)
    if method == "later":
        pool.load(0)
        while not pool.wait(60):
            pass  # the fork server has imported all
        before, start = children_seconds(), time.perf_counter()
    pool.load(0)
    while not pool.wait(60):
        pass
    taken = Taken(children_seconds() - before, time.perf_counter() - start)
    pool.close()
    return taken


def children_seconds() -> float:
    """CPU seconds of the processes below this one that run now."""
    table = {int(path.name): path for path in Path("/proc").iterdir() if path.name.isdecimal()}
    parents = {}
    for number, path in table.items():
        with suppress(OSError):  # it has ended
            parents[number] = int((path / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    below, found = {os.getpid()}, -1
    while found != len(below):
        found = len(below)
        below |= {number for number, parent in parents.items() if parent in below}
    return sum(seconds_of([number]) for number in below - {os.getpid()} if table[number].exists())


def answer_started(pipe: Connection, method: str) -> None:
    pipe.send(started(method))


def measure_starts(options: argparse.Namespace) -> dict[str, Any]:
    """Median CPU and wall seconds of each way to start a worker, in turns, each in a process of its own."""
    figures: dict[str, list[Taken]] = {method: [] for method in STARTS}
    context = multiprocessing.get_context("spawn")
    for _ in range(options.repetitions):
        for method in STARTS:
            wait_for_peace(options.patience)
            ours, theirs = context.Pipe()
            process = context.Process(target=answer_started, args=(theirs, method))
            process.start()
            figures[method].append(ours.recv())
            process.join()
            print(f"{method:13s} {figures[method][-1].cpu:6.2f} CPU-s {figures[method][-1].wall:6.2f} s", flush=True)
    return {
        method: {"cpu": median(turn.cpu for turn in turns), "wall": round(median(turn.wall for turn in turns), 2)}
        for method, turns in figures.items()
    }


def least(turns: Sequence[Taken]) -> float:
    return min(taken.wall for taken in turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of an arm in a turn")
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--loops", type=int, default=3, help="processes beside which it is busy")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet moment before a turn")
    parser.add_argument("--quick", action="store_true", help="small steps, once: does it run?")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--idle", action="store_true", help="turns beside nothing alone")
    only.add_argument("--start", action="store_true", help="how workers start")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rows_per_step, options.repetitions, options.loops, options.patience = 1, 4, 1, 1, 0
    if options.start:
        print(json.dumps(measure_starts(options)))
        return
    figures = measure(options)
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"cores": cores, "loops": options.loops}
    for state in figures["default"]:
        result[f"others_{state}"] = round(median(taken.others for arm in figures.values() for taken in arm[state]), 2)
    default = figures["default"]
    for name, arm in figures.items():
        threads = min(cores, int(ARMS[name].get("OMP_NUM_THREADS", cores)))
        result[name] = {
            "best_wall": round(least(arm["free"]) / least(default["free"]), 3),
            "free_wall": ratio(arm["free"], default["free"], WALL),
            "free_cpu": ratio(arm["free"], default["free"], CPU),
        }
        if not options.idle:
            result[name] |= {
                "busy_wall": ratio(arm["busy"], default["busy"], WALL),
                "busy_cpu": ratio(arm["busy"], default["busy"], CPU),
                "slower_busy": ratio(arm["busy"], arm["free"], WALL),
                "fair": max(1.0, round((threads + options.loops) / cores, 2)),
            }
        print(f"{name:13s} " + ", ".join(f"{title} {value}" for title, value in result[name].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
