"""Seconds of `pairclf evaluate` on as many rows as LMSYS has; and how often its intervals hold what they promise.

    python benchmarks/scores.py --rows 57477
    python benchmarks/scores.py --coverage 400 --rows 1000

The rows are made up: texts as long as those of LMSYS on average, 12% of them with a prompt that another row has, labels
drawn from true probabilities, logits of both orders with noise, a bias for the first side and a temperature.

`--coverage` draws so many tables of rows, of one to four rows a prompt that are alike, and counts the intervals that
hold the figure of 400,000 rows: over prompts, and, as the wrong variant, over rows. It also counts how often a
temperature is held to be worth it although the scores are calibrated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from pairclf.config import resolve
from pairclf.data.identity import row_hashes
from pairclf.data.scores import write_logits
from pairclf.run import folds_of, labelled_rows
from pairclf.runs.evaluate import evaluate, out_of_fold
from pairclf.runs.evaluation_report import as_tree, render
from pairclf.scores.calibration import NestedCalibration, fit_nested
from pairclf.scores.figures import METRICS, Judged, judge, values_of
from pairclf.scores.intervals import difference, estimate
from pairclf.scores.metrics import Floats, row_losses
from pairclf.scores.probabilities import logits_of, probabilities
from pairclf.task import LMSYS

COVERED = ("log_loss", "accuracy", "macro_f1", "roc_auc", "brier", "matthews", "calibration_error_debiased")
WORDS = ("the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with")


def made_up(rows: int, seed: int = 0) -> tuple[pl.DataFrame, Floats]:
    """LMSYS's columns, and logits `(N, 2, 3)`."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(rows, 3))
    chances = np.exp(truth) / np.exp(truth).sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) > generator.uniform(size=(rows, 1))).argmax(axis=1)
    book = " ".join(generator.choice(WORDS, size=200_000))
    cells: dict[str, list[str]] = {}
    for name, median, spread in (("prompt", 22, 1.56), ("response_a", 225, 0.8), ("response_b", 225, 0.8)):
        lengths = np.minimum(4 * generator.lognormal(np.log(median), spread, size=rows), 50_000).astype(int) + 1
        starts = generator.integers(len(book) - 50_001, size=rows)
        texts = [book[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        cells[name] = [json.dumps([text]) for text in texts]
    repeated = generator.uniform(size=rows) < 0.12
    sources = generator.integers(rows, size=rows)
    cells["prompt"] = [cells["prompt"][sources[row]] if repeated[row] else cells["prompt"][row] for row in range(rows)]
    one_hot = dict(zip(LMSYS.classes, np.eye(3, dtype=int)[labels].T.tolist(), strict=True))
    seen = truth + 0.7 * generator.normal(size=truth.shape)
    both = np.stack([seen, seen[:, list(LMSYS.swapped_columns)]], axis=1) + np.array([0.3, 0.0, 0.0])
    both += 0.3 * generator.normal(size=both.shape)
    return pl.DataFrame({"id": [str(row) for row in range(rows)], **cells, **one_hot}), 1.4 * both


def alike(rows: int, seed: int, heat: float = 1.3) -> tuple[Judged, NDArray[np.int64]]:
    """Rows of prompts with one to four rows that are alike, scored too surely by `heat`, and their prompts."""
    generator = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(rows), generator.integers(1, 5, size=rows))[:rows]
    truth = generator.normal(size=(rows, 3))[prompts] + 0.3 * generator.normal(size=(rows, 3))
    chances = probabilities(truth, LMSYS)
    one = generator.uniform(size=(rows, 1))[prompts]  # a prompt's labels are nearly the same draw
    draw = np.where(generator.uniform(size=(rows, 1)) < 0.7, one, generator.uniform(size=(rows, 1)))
    labels = np.eye(3)[np.minimum((chances.cumsum(axis=1) < draw).sum(axis=1), 2)]
    return judge(probabilities(heat * truth, LMSYS), labels, LMSYS), prompts


def coverage(trials: int, rows: int) -> dict[str, Any]:
    population = values_of(alike(400_000, 10**6)[0])
    held = {kind: dict.fromkeys(COVERED, 0) for kind in ("prompts", "rows")}
    accepted = 0
    for trial in range(trials):
        judged, prompts = alike(rows, trial)
        statistics = {name: METRICS[name].statistic(judged) for name in COVERED}
        for kind, groups in (("prompts", prompts), ("rows", np.arange(rows))):
            for name, found in estimate(statistics, groups).items():
                held[kind][name] += found.low <= population[name] <= found.high
        accepted += _is_accepted(*alike(rows, trial, heat=1.0))
    shares = {kind: {name: count / trials for name, count in counts.items()} for kind, counts in held.items()}
    return {"trials": trials, "rows": rows, "covered": shares, "calibrations_of_calibrated_scores": accepted / trials}


def _is_accepted(judged: Judged, prompts: NDArray[np.int64]) -> bool:
    logits = logits_of(judged.predicted, LMSYS)
    fitted = fit_nested(
        "temperature",
        lambda calibration, rows=None, /: probabilities(logits if rows is None else logits[rows], LMSYS, calibration),
        judged,
        prompts % 5,
    )
    raw = row_losses(judged.predicted, judged.target)
    gain = difference(raw, fitted.losses, prompts)
    return NestedCalibration(fitted, float(raw.mean()), float(fitted.losses.mean()), gain).is_worth_it


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--coverage", type=int, help="number of tables to draw")
    options = parser.parse_args()
    if options.coverage:
        print(json.dumps(coverage(options.coverage, options.rows)))
        return
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        frame, logits = made_up(options.rows)
        frame.write_csv(Path(folder, "train.csv"))
        config = resolve(
            {
                "task": "lmsys",
                "output_dir": f"{folder}/run",
                "data": {"folder": folder, "train": "train.csv"},
                "folds": {"near_duplicate_threshold": None},
            }
        )
        Path(folder, "run").mkdir()
        folds_of(config, labelled_rows(config))  # `cv` has made them
        ids = frame["id"]
        labelled = labelled_rows(config)
        write_logits(Path(folder, "run", "oof-logits.parquet"), ids, logits, row_hashes(labelled, LMSYS))
        cpu = time.process_time()
        with timed(seconds, "read the rows"):
            labelled = labelled_rows(config)
        with timed(seconds, "read the scores"):
            scores, folds = out_of_fold(Path(folder, "run"), LMSYS, config.predict), folds_of(config, labelled)
        with timed(seconds, "evaluate"):
            evaluation = evaluate(labelled, scores, LMSYS, folds=folds)
        with timed(seconds, "print"):
            Console().print(render(evaluation, LMSYS))
            figures = as_tree(evaluation)
    total = round(sum(seconds.values()), 2)
    result = {"rows": options.rows, "seconds": seconds, "total": total, "cpu": round(time.process_time() - cpu, 2)}
    print(json.dumps(result | {"log_loss": figures["figures"]["log_loss"]}))


if __name__ == "__main__":
    main()
