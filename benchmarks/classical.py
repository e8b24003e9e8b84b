"""The classical approach at the size of the LMSYS competition: seconds and memory of training and of scoring.

    python benchmarks/classical.py FOLDER [--rows 57477] [--test-rows 25000] [--config configs/arena3/classical.yaml] \
        [KEY=VALUE ...]

FOLDER holds `train.csv` in LMSYS's format, such as arena3. Its rows are combined anew from a seed: a prompt, and two of
the answers that it got, each cut to a length drawn from LMSYS's lengths (characters ~ LogNormal(median 1,400, s 0.95)),
with a label at random. The commands run as a user runs them, each in a process of its own:

    pairclf train CONFIG                        on all rows
    pairclf predict BUNDLE --data test.csv

The last line is one JSON object: characters of a row, wall and CPU seconds, and the largest memory of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from pairclf.task import LMSYS

SEED = 0


def written(source: pl.DataFrame, path: Path, rows: int, draw: np.random.Generator, *, labels: bool) -> float:
    """Write rows of combined texts, and return the mean number of their characters."""
    answers: dict[str, list[str]] = {}
    for prompt, *pair in source.select(LMSYS.fields).iter_rows():
        answers.setdefault(prompt, []).extend(pair)
    prompts = sorted(answers)
    cells = []
    for number in range(rows):
        prompt = prompts[draw.integers(len(prompts))]
        places = draw.integers(len(answers[prompt]), size=2)
        turns = [json.loads(answers[prompt][place]) for place in places]
        cut = np.exp(draw.normal(np.log(1400), 0.95, 2)).astype(int).tolist()
        shorter = [[(turn or "")[:length] for turn in side] for side, length in zip(turns, cut, strict=True)]
        cells.append((f"{number}", prompt, *(json.dumps(side, ensure_ascii=False) for side in shorter)))
    frame = pl.DataFrame(cells, schema=["id", *LMSYS.fields], orient="row")
    if labels:
        hot = np.eye(len(LMSYS.classes), dtype=int)[draw.integers(len(LMSYS.classes), size=rows)]
        frame = frame.with_columns(pl.Series(name, hot[:, place]) for place, name in enumerate(LMSYS.classes))
    frame.write_csv(path)
    lengths = frame.select(pl.sum_horizontal(pl.col(name).str.len_chars() for name in LMSYS.fields)).to_series()
    return float(lengths.to_numpy().mean())


def measured(*arguments: object) -> dict[str, float]:
    """Run a command of pairclf, and measure it and its children."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "pairclf", *map(str, arguments)])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"pairclf {arguments[0]} failed")
    seconds = time.perf_counter() - start
    return {
        "wall_s": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--test-rows", type=int, default=25_000)
    parser.add_argument("--config", type=Path, default=Path("configs/arena3/classical.yaml"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    source, draw = pl.read_csv(options.folder / "train.csv", infer_schema=False), np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder), Path(folder) / "run"
        characters = written(source, data / "train.csv", options.rows, draw, labels=True)
        written(source, data / "test.csv", options.test_rows, draw, labels=False)
        settings = [f"data.folder={data}", "data.sample_submission=null", f"output_dir={output}", *options.overrides]
        figures = {"rows": options.rows, "characters": round(characters)}
        train = measured("train", options.config, *settings)
        bundle, test = output / "all" / "bundle", data / "test.csv"
        predict = measured("predict", bundle, "--data", test, "--out", data / "submission.csv")
        print(json.dumps({**figures, "train": train, "test_rows": options.test_rows, "predict": predict}))


if __name__ == "__main__":
    main()
