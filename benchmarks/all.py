"""All benchmarks at a small size, one after the other: do they run, and about what do they say?

    python benchmarks/all.py [--out runs/bench.json] [--minutes 10] [--only training inference]

`make bench` calls it. Each runs in a process of its own. A failing one stops no other, and makes the exit code 1. The
same command goes on after an interruption, or with those that failed; after a run without failures all begin anew. At
the end `--out` holds one JSON object: of each benchmark its command, what its figures mean, its goal at full size, and
the figures. Small sizes say little about speed: docs/performance.md has the figures of full sizes, with their commands.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from steps import Figures, Run, Step, run_steps

from pairclf.console import stdout, table
from pairclf.demo.arena import generate, write_lmsys
from pairclf.files import write_json

FOLDER = Path(__file__).parent
LIMIT = 300
"""Seconds after which a benchmark is ended."""
HELPERS = ("all", "peers", "steps")
"""Files in this folder that are no benchmarks."""


class Record(NamedTuple):
    """A benchmark.

    Attributes:
        small: arguments of its small run. `{work}` is a folder of its own, `{arena}` one with the synthetic arena.
        means: what its last line of JSON says.
        goal: what it should say at full size.
        shown: keys of figures that the table shows; a dot leads into an object.
        script: its file; None: that of its name.
    """

    small: str
    means: str
    goal: str
    shown: tuple[str, ...]
    script: str | None = None


RECORDS = {
    "approaches": Record(
        "--rows 60 --sets synthetic --arena-rows 84 --max-length 96 --model embedded:llama-tiny "
        "--arms logistic zero-shot reward --out {work}",
        "log loss of each approach on the same rows",
        "none: it compares",
        ("logistic", "reward"),
    ),
    "audit": Record(
        "--rows 2000 --repetitions 3",
        "reading and auditing over polars' reading and decoding alone",
        "at most 2 in CPU time",
        ("read_audit_over_polars_cpu", "read_audit_over_polars_wall"),
    ),
    "blend": Record(
        "--rows 3000 --members 4 --folds 3",
        "seconds and nested log loss of each way to blend",
        "60 s of wall time at 57,477 rows",
        ("wall_s", "cpu_s"),
    ),
    "busy": Record(
        "--quick",
        "a training step beside other processes over the same step alone, by OpenMP's settings",
        "a fair share with OMP_WAIT_POLICY=passive",
        ("passive.slower_busy", "passive.fair"),
    ),
    "classical": Record(
        "{arena} --rows 300 --test-rows 60 --config configs/demo/classical.yaml",
        "seconds and memory of training and scoring",
        "none",
        ("train.cpu_s", "predict.cpu_s"),
    ),
    "compare": Record(
        "--rows 400 --trials 5",
        "shares of trials in which equals and unequals were called different",
        "at most 5% of equals",
        ("equal", "planted"),
    ),
    "encoder_decoders": Record(
        "--rows 120 --epochs 1 --width 32 --layers 1 --max-length 96",
        "log loss of three ways to logits of a random T5",
        "none: it compares",
        (),
    ),
    "encoders": Record(
        "--quick",
        "packed BERT over CrossEncoder.predict, and over HF Trainer",
        "1.3 in prediction, 1.5 in training",
        ("pairclf_over_cross_encoder.ratio", "packed_over_trainer.ratio"),
    ),
    "folds": Record(
        "--rows 2000",
        "seconds of folds, and the share of near duplicates that stand together",
        "all together",
        ("stratified_cpu_s", "stratified_recall"),
    ),
    "gpu": Record(
        "--miniature --parts layouts float16 training out_of_memory --out {work}",
        "the GPU's script in miniature",
        "its own: docs/performance.md",
        ("layouts.device", "training.first_losses_apart"),
    ),
    "inference": Record(
        "--quick --workload lmsys",
        "prediction over the ways that it is done elsewhere",
        "2.0 over the order of the file, 1.12 over the sorted file, 1.1 over one row at a time",
        ("lmsys.pairclf_over_sorted.ratio", "lmsys.pairclf_over_single.ratio"),
    ),
    "inputs": Record(
        "--tokenizer pairclf/embedded/llama-tiny --rows 40 --repetitions 3",
        "tokenising over a row loop, one call, and datasets.map",
        "4 over the row loop, 3 over one call",
        ("over_row_loop", "over_batched"),
    ),
    "lastweek_blend": Record(
        "blend --out {work} --rows 200",
        "what the plans of a deadline lose against the best ones",
        "none: it judges",
        ("blend.plans",),
        "lastweek",
    ),
    "lastweek_forecast": Record(
        "forecast --sets 3 --rows 300 --hidden 200",
        "how often a forecast's interval holds the score",
        "90%",
        ("forecast.none.forecast_private", "forecast.long.forecast_private"),
        "lastweek",
    ),
    "lastweek_labels": Record(
        "labels --out {work} --rows 400 --models classical",
        "planted label errors among the first suspects, and what soft labels gain",
        "80 of the first 100",
        ("labels.classical.precision_100",),
        "lastweek",
    ),
    "scores": Record(
        "--rows 2000", "seconds of `pairclf evaluate`", "20 s of wall time for 57,477 rows", ("total", "cpu")
    ),
    "training": Record(
        "--quick",
        "packed training over HF Trainer and others",
        "1.05 over one row at a time, 1.12 over length-grouped",
        ("packed_over_single", "packed_over_grouped", "packed_over_random"),
    ),
}


def script_of(name: str) -> str:
    """The name of a benchmark's file."""
    return RECORDS[name].script or name


def command_of(name: str, work: Path) -> list[str]:
    """The command of a benchmark's small run."""
    places = {"work": work / name, "arena": work / "arena"}
    small = [part.format(**places) for part in shlex.split(RECORDS[name].small)]
    return [sys.executable, str(FOLDER / f"{script_of(name)}.py"), *small]


def value_of(figures: Figures, key: str) -> object:
    """The figure at a key of `Record.shown`; None: there is none."""
    value: object = figures
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def write_report(path: Path, names: Sequence[str], found: dict[str, Figures], seconds: float) -> None:
    """All lines as one JSON object."""
    records = {
        name: {
            "command": shlex.join(["python", f"benchmarks/{script_of(name)}.py", *shlex.split(RECORDS[name].small)]),
            "means": RECORDS[name].means,
            "goal_at_full_size": RECORDS[name].goal,
            **found[name],
        }
        for name in names
    }
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "torch": version("torch")}
    write_json(path, {**machine, "seconds": round(seconds), "benchmarks": records})


def print_table(names: Sequence[str], found: dict[str, Figures]) -> None:
    shown = table("benchmarks at a small size", "benchmark", "seconds", "figures")
    for name in names:
        line = found[name]
        values = {key: value_of(line, key) for key in RECORDS[name].shown}
        figures = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        shown.add_row(name, str(line.get("took_s", "")), line.get("error") or figures)
    stdout.print(shown)


def main(
    arguments: Sequence[str] | None = None, *, clock: Callable[[], float] = time.monotonic, run: Run | None = None
) -> int:
    """Returns the exit code: 1 if a benchmark failed, or was left for the next call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--minutes", type=float, default=10, help="for all; what would begin later is left")
    parser.add_argument("--only", nargs="+", choices=RECORDS, default=[*RECORDS])
    options = parser.parse_args(arguments)
    names, out, start = options.only, options.out, clock()
    work = out.with_suffix("")
    if not (work / "arena").exists():
        write_lmsys(generate(120, seed=0), work / "arena", n_test=4)
    steps = [Step(name, command_of(name, work), LIMIT) for name in names]
    results = work / "results.jsonl"
    found = run_steps(steps, results, seconds=60 * options.minutes, clock=clock, run=run)
    write_report(out, names, found, clock() - start)
    print_table(names, found)
    failed = [name for name in names if "error" in found[name]]
    if not failed:
        shutil.rmtree(work)
    print(json.dumps({"benchmarks": len(names), "failed": failed, "report": str(out)}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
