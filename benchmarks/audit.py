"""Reading and auditing an LMSYS-like file, against polars' own reading and decoding of it.

    python benchmarks/audit.py [--rows 57477] [--repetitions 7]

The file is made from a seed: lengths as LMSYS has them (tokens of a prompt: log-normal, median 22, s 1.56; of the
answers: median 225, s 0.80, correlated by 0.65; 14% of the rows have several turns), words from the synthetic arena.
The arms run in turns, so that a noisy machine is noisy for all; the first arm runs twice, and its ratio to itself says
how far to trust the others. The last line is a JSON object: medians of the ratios within a repetition.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl

from pairclf.config import Rules
from pairclf.data.audit import audit
from pairclf.data.rows import read_rows
from pairclf.demo.arena import generate
from pairclf.task import LMSYS

WORDS_PER_TOKEN = 0.75
LONGEST = 9_000  # tokens
MULTI_TURN = 0.14
WORDS_A_LINE = 17  # ten line breaks in 1,000 characters, as answers in chats have


def make(path: Path, rows: int, seed: int = 0) -> None:
    """Write the file."""
    random = np.random.default_rng(seed)
    texts = (turn for row in generate(4_000, seed=seed).rows for turn in (*row.prompt, *row.response_a))
    words = np.array(" ".join(map(str, texts)).split(), dtype=np.object_)
    words[::WORDS_A_LINE] += "\n"
    first = random.normal(size=rows)
    second = 0.65 * first + np.sqrt(1 - 0.65**2) * random.normal(size=rows)
    tokens = {
        "prompt": 22 * np.exp(1.56 * random.normal(size=rows)),
        "response_a": 225 * np.exp(0.80 * first),
        "response_b": 225 * np.exp(0.80 * second),
    }
    turns = np.where(random.random(rows) < MULTI_TURN, random.integers(2, 5, size=rows), 1)

    def cell(length: float, count: int) -> str:
        size = max(1, int(min(length, LONGEST) * WORDS_PER_TOKEN / count))
        starts = random.integers(0, len(words) - size, size=count)
        return json.dumps([" ".join(words[start : start + size]) for start in starts], ensure_ascii=False)

    cells = {name: [cell(*one) for one in zip(lengths, turns, strict=True)] for name, lengths in tokens.items()}
    labels = random.integers(3, size=rows)
    wins = {name: (labels == place).astype(int) for place, name in enumerate(LMSYS.classes)}
    pl.DataFrame({"id": np.arange(rows), "model_a": "x", "model_b": "y", **cells, **wins}).write_csv(path)


def polars_alone(path: Path) -> None:
    frame = pl.read_csv(path, infer_schema=False)
    frame.with_columns(pl.col(LMSYS.fields).str.json_decode(pl.List(pl.String)))


def read_and_audit(path: Path) -> None:
    audit(read_rows([path], LMSYS, labelled=True), LMSYS, Rules(), labelled=True)


ARMS: dict[str, Callable[[Path], None]] = {"a": polars_alone, "b": polars_alone, "pairclf": read_and_audit}


def measure(act: Callable[[Path], None], path: Path) -> tuple[float, float]:
    """CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    act(path)
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(path: Path, repetitions: int) -> dict[str, float]:
    for act in ARMS.values():
        act(path)  # files cached, memory mapped
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for repetition in range(repetitions):
        for name in list(ARMS)[:: 1 if repetition % 2 else -1]:
            runs[name].append(measure(ARMS[name], path))
        shown = "  ".join(f"{name} {cpu[-1][0]:.2f} cpu {cpu[-1][1]:.2f} wall" for name, cpu in runs.items())
        print(f"repetition {repetition + 1}: {shown}", flush=True)

    def ratio(arm: str, clock: int) -> float:
        return round(median(x[clock] / a[clock] for x, a in zip(runs[arm], runs["a"], strict=True)), 3)

    return {
        "aa_cpu": ratio("b", 0),
        "aa_wall": ratio("b", 1),
        "read_audit_over_polars_cpu": ratio("pairclf", 0),
        "read_audit_over_polars_wall": ratio("pairclf", 1),
    }


def in_a_process(*arguments: str) -> str:
    """Run this script once more, on its own, so that its memory is its own."""
    return subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.rows)
    elif given.once:
        read_and_audit(given.once)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB to GiB
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "train.csv")
            in_a_process("--make", str(path), "--rows", str(given.rows))
            print(f"{given.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB", flush=True)
            peak = float(in_a_process("--once", str(path)))
            result = {"rows": given.rows, **compare(path, given.repetitions), "peak_rss_gb": round(peak, 3)}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
