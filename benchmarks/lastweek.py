"""The last week's choices beside the truth of the synthetic arena: what is lost by choosing from held-out rows.

    python benchmarks/lastweek.py blend --out runs/lastweek [--rows 2000] [--deadlines 0.25 0.5 0.75]

`blend`: four classical models are cross-validated, and the plans of `pairclf blend --deadline` are found from labels.
Each plan that can be written is then judged by the true probabilities of the same rows. Regret: the chosen plan's loss
against the truth, less that of the best plan in time by truth, each with the weights that `blend` fits to the labels.
Deadlines are parts of the time of all models in both orders; `shuffled` is the mean regret of all plans in time, which
is what a choice by lot loses. Finished trainings are kept. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import load_config
from pairclf.console import progress
from pairclf.data.scores import class_matrix
from pairclf.demo.arena import generate, write_lmsys
from pairclf.inference.forecast import pass_seconds
from pairclf.packaging.own_files import shipped
from pairclf.run import output_of
from pairclf.runs.cv import cross_validate
from pairclf.runs.held_out import CommonRows, open_runs
from pairclf.runs.plan import plannable
from pairclf.scores.plans import (
    SHARES,
    SWAP_SHARES,
    FoundPlan,
    Plan,
    PlannableRows,
    Seconds,
    best_within,
    fit_plan,
    ordered,
    probabilities_of,
    search,
    uses_of,
)
from pairclf.task import LMSYS

CONFIG = "configs/demo/classical.yaml"
MODELS = ("logistic", "lightgbm", "nb", "svm")
TEST_ROWS, HIDDEN_ROWS, DEVICE = 400, 25_000, "t4x2"


def runs_of(out: Path, rows: int) -> CommonRows:
    """Cross-validated models on `rows` rows of the arena."""
    data, folders = out / "data", []
    if not (data / "truth.parquet").exists():
        write_lmsys(generate(rows + TEST_ROWS, seed=0), data, n_test=TEST_ROWS)
    for name in MODELS:
        settings = [f"data.folder={data}", "data.test=test.csv", "data.sample_submission=null", "folds.n_splits=3"]
        config = load_config(shipped(CONFIG), [*settings, f"classical.model={name}", f"output_dir={out / name}"])
        cross_validate(config, resume=True)
        folders.append(output_of(config))
    return open_runs(folders)


def every_plan(data: PlannableRows) -> list[Plan]:
    """All plans, as the definition of a plan has them."""
    losses = [data.rows.loss(member) for member in data.rows.members]
    ranks = [sorted(range(len(losses)), key=losses.__getitem__).index(member) for member in range(len(losses))]
    choices = product(*([None, *uses_of(member, data)] for member in range(len(losses))))
    plans = (ordered(filter(None, choice), ranks) for choice in choices)
    return [plan for plan in plans if plan and plan[0].share == 1]


def blend_regret(out: Path, rows: int, parts: list[float]) -> dict[str, Any]:
    """What the plans that labels choose lose by truth."""
    common = runs_of(out, rows)
    costs = [
        Seconds(*pass_seconds(run.bundles[0], out / "data/test.csv", device=DEVICE, rows=HIDDEN_ROWS))
        for run in common.runs
    ]
    data = plannable(common, costs)
    frame = pl.DataFrame({"id": common.ids}).join(pl.read_parquet(out / "data/truth.parquet"), on="id", how="left")
    truth = replace(data.rows, targets=class_matrix(frame, LMSYS))
    start = time.process_time()
    front = search(data)
    seconds, plans = time.process_time() - start, every_plan(data)
    by_truth: list[tuple[float, float, Plan]] = []
    with progress("judging plans", len(plans)) as advance:
        for plan in plans:
            loss = truth.loss(probabilities_of(plan, data, fit_plan(plan, data)))
            by_truth.append((data.seconds_of(plan), loss, plan))
            advance()
    total = sum(sum(cost) for cost in data.seconds)
    return {
        "rows": rows,
        "plans": len(plans),
        "search_cpu_s": round(seconds, 1),
        "models": {name: round(truth.loss(member), 5) for name, member in zip(MODELS, data.rows.members, strict=True)},
        "entropy": round(truth.loss(truth.targets), 5),
        "deadlines": [_regret(part, part * total, front, by_truth) for part in parts],
    }


def _regret(
    part: float, limit: float, front: list[FoundPlan], by_truth: list[tuple[float, float, Plan]]
) -> dict[str, Any]:
    in_time = {plan: loss for seconds, loss, plan in by_truth if seconds <= limit}
    chosen, best = best_within(front, limit), min(in_time, key=in_time.__getitem__, default=None)
    if chosen is None or best is None:
        return {"part_of_time": part, "plans_in_time": 0}
    return {
        "part_of_time": part,
        "plans_in_time": len(in_time),
        "chosen": [(MODELS[use.member], use.share, use.swap_share) for use in chosen.plan],
        "best": [(MODELS[use.member], use.share, use.swap_share) for use in best],
        "regret": round(in_time[chosen.plan] - in_time[best], 5),
        "shuffled": round(float(np.mean([*in_time.values()])) - in_time[best], 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["blend"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--deadlines", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    options = parser.parse_args()
    figures = blend_regret(options.out, options.rows, options.deadlines)
    print(json.dumps({options.part: figures | {"shares": SHARES, "swap_shares": SWAP_SHARES}}))


if __name__ == "__main__":
    main()
