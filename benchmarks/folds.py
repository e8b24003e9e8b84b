"""Folds at the size of the LMSYS competition: how long they take, and whether near-duplicates share one.

    python benchmarks/folds.py [--rows 57477]

Makes labelled rows with different prompts from a seed: words drawn by Zipf's law, lengths log-normal with a
median of 22 words. One row in twenty is a near-duplicate of an earlier one, with a word of its prompt changed, in
places that leave the Jaccard index of their 5-grams at 0.8 or more. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from pairclf.console import stdout
from pairclf.data.duplicates import SHINGLE
from pairclf.data.folds import assert_no_leak, make_folds, report
from pairclf.task import LMSYS

NEAR, N, SEED = 0.8, 5, 0
LETTERS = np.array(list("etaoinshrdlucmfw"))


def some_prompts(draw: np.random.Generator, rows: int) -> tuple[list[str], list[int]]:
    """Different prompts `(rows,)`, and for each of the last twentieth the place of the one that it resembles."""
    own = rows - rows // 20
    lengths = draw.integers(2, 10, 20_000)
    words = np.array(["".join(draw.choice(LETTERS, length)) for length in lengths])
    chances = 1 / np.arange(10, 10 + len(words))
    originals: dict[str, None] = {}
    while len(originals) < own:
        count = int(np.clip(draw.lognormal(np.log(22), 1.56), 2, 20_000))
        originals[" ".join(words[draw.choice(len(words), count, p=chances / chances.sum())])] = None
    prompts, sources = list(originals), []
    while len(prompts) < rows:
        source = int(draw.integers(own))
        changed = prompts[source].split()
        changed[draw.integers(len(changed))] = f"x{draw.integers(100)}"
        text = " ".join(changed)
        if text not in originals and jaccard(text, prompts[source]) >= NEAR:
            originals[text] = None
            prompts.append(text)
            sources.append(source)
    return prompts, sources


def jaccard(one: str, other: str) -> float:
    a, b = ({text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)} for text in (one, other))
    return len(a & b) / max(len(a | b), 1)


def measured(title: str, job: Callable[[], Any], figures: dict[str, float]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    made = job()
    figures[f"{title}_wall_s"] = round(time.perf_counter() - wall, 2)
    figures[f"{title}_cpu_s"] = round(time.process_time() - cpu, 2)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=57_477)
    rows = parser.parse_args().rows
    draw = np.random.default_rng(SEED)
    prompts, sources = some_prompts(draw, rows)
    frame = pl.DataFrame(
        {
            "id": [str(row) for row in range(rows)],
            "prompt": [[prompt] for prompt in prompts],
            "response_a": [["a"]] * rows,
            "response_b": [["b"]] * rows,
            "target": np.eye(3)[draw.integers(3, size=rows)].tolist(),
            "group": pl.Series([None] * rows, dtype=pl.String),
            "train_only": [False] * rows,
        }
    )
    figures: dict[str, float] = {"rows": rows, "words": sum(prompt.count(" ") + 1 for prompt in prompts)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, stable in (("stratified", False), ("stable", True)):
        folds = measured(
            name, lambda stable=stable: make_folds(frame, LMSYS, n=N, seed=SEED, near=NEAR, stable=stable), figures
        )
        stdout.print(report(folds, frame, LMSYS))
        fold = folds["fold"].to_numpy()
        twins, originals = fold[rows - len(sources) :], fold[sources]
        figures[f"{name}_recall"] = round(float(((twins == originals) | (twins < 0) | (originals < 0)).mean()), 5)
        figures[f"{name}_set_aside"] = int((fold < 0).sum())
        measured(f"{name}_assert", lambda folds=folds: assert_no_leak(frame, folds, range(N), LMSYS, NEAR), figures)
    figures["rows_mb"] = before // 1024
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
