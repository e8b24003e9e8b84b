"""Planted label errors and a distilled student on the synthetic arena: what `suspects` and `distill` are worth.

    python benchmarks/lastweek_labels.py --out runs/lastweek-labels [--rows 4000] [--flips 0.1] [--models classical]

Of the training rows, a share has its winner exchanged. Each model is cross-validated on them; `pairclf suspects` ranks
the labels (precision@100: which of the first 100 were planted; the ceiling is that of the true probabilities), and the
same model is trained again on its soft labels. Both are judged on the rows that were left clean, out of fold, and on
the test rows against their true probabilities, which no model has seen. Then `pairclf distill` teaches the classical
model by the demo's. Differences are paired, with half of their 95% interval by prompt. Finished trainings are kept: the
same command continues. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import Config, load_config
from pairclf.console import stdout
from pairclf.data.folds import prompt_groups
from pairclf.data.rows import read_rows
from pairclf.data.scores import class_matrix, read_scores
from pairclf.demo.arena import Arena, generate, write_lmsys
from pairclf.inference.predict import predict
from pairclf.packaging.own_files import shipped
from pairclf.run import bundles_of, output_of
from pairclf.runs.cv import cross_validate
from pairclf.runs.distill import TAUGHT, UNTAUGHT, distill, plan_students
from pairclf.runs.held_out import open_runs
from pairclf.runs.suspects import find_suspects, write_suspects
from pairclf.scores.intervals import Estimate, difference
from pairclf.scores.metrics import Floats, row_losses
from pairclf.task import LMSYS

TEST_ROWS = 400
FLIPS = "flips.csv"
MODELS = {
    "classical": ("configs/demo/classical.yaml", ["folds.n_splits=5"]),
    "demo": ("configs/demo/gemma2-tiny.yaml", []),
}
"""Config and settings of each model: LightGBM in five folds, and the demo's model in its two."""


def write_rows(folder: Path, rows: int, share: float, seed: int = 0) -> None:
    """Write an arena with planted errors, and their ids as `flips.csv`."""
    arena = generate(rows + TEST_ROWS, seed=seed)
    training, _ = arena.split(TEST_ROWS)
    decided = [row.id for row in training.rows if row.label < 2]
    flipped = {*np.random.default_rng(seed).choice(decided, size=round(share * len(training.rows)), replace=False)}
    changed = [replace(row, label=1 - row.label) if row.id in flipped else row for row in arena.rows]
    write_lmsys(Arena(tuple(changed)), folder, n_test=TEST_ROWS)
    pl.DataFrame({"id": sorted(flipped)}).write_csv(folder / FLIPS)


def config_of(name: str, out: Path, *more: str) -> Config:
    """The config of a model on the planted rows."""
    path, settings = MODELS[name]
    data = [f"data.folder={out / 'data'}", "data.test=null", "data.sample_submission=null"]
    return load_config(shipped(path), [*data, f"output_dir={out / name}", *settings, *more])


def truth_of(out: Path, ids: Sequence[str]) -> Floats:
    """True probabilities `(N, 3)` of rows."""
    frame = pl.DataFrame({"id": list(ids)}).join(pl.read_parquet(out / "data/truth.parquet"), on="id", how="left")
    return class_matrix(frame, LMSYS)


def as_figures(gap: Estimate) -> dict[str, float]:
    """A difference with half of its interval."""
    return {"value": round(gap.value, 4), "half": round((gap.high - gap.low) / 2, 4)}


def on_test_rows(out: Path, runs: Mapping[str, Path]) -> tuple[dict[str, Floats], list[str]]:
    """Losses `(N,)` of the test rows against their true probabilities, of the mean over a run's folds; prompts."""
    losses: dict[str, Floats] = {}
    frame = read_rows([out / "data/test.csv"], LMSYS, labelled=False)
    for name, run in runs.items():
        scores = run / "test-scores.parquet"
        if not scores.exists():
            bundles = sorted(run.glob("fold*/bundle"))
            predict(bundles, out / "data/test.csv", run / "submission.csv", scores=scores, resume=False)
        joined = frame.select("id").join(read_scores(scores, LMSYS), on="id", how="left", maintain_order="left")
        losses[name] = row_losses(class_matrix(joined, LMSYS), truth_of(out, frame["id"].to_list()))
    return losses, prompt_groups(frame, LMSYS).to_list()


def ceiling(out: Path, ids: Sequence[str], labels: Floats, flipped: np.ndarray[Any, Any], share: float) -> float:
    """Precision@100 of a judge who knows the true probabilities and the share of errors."""
    truth, place = truth_of(out, ids), labels.argmax(axis=1)
    rows = np.arange(len(place))
    given, other = truth[rows, place], truth[:, list(LMSYS.swapped_columns)][rows, place]
    wrong = np.where(place < 2, share * other / (share * other + (1 - share) * given), 0)
    return float(flipped[np.argsort(-wrong, kind="stable")[:100]].mean())


def as_published(scores: Floats, targets: Floats) -> Floats:
    """P(wrong) `(N,)` by the noise matrix that confident learning counts as it was published; both orders count."""
    swapped = list(LMSYS.swapped_columns)
    values, labels = np.concatenate([scores, scores[:, swapped]]), np.concatenate([targets, targets[:, swapped]])
    confident = values >= (values * labels).sum(axis=0) / labels.sum(axis=0)
    right = np.where(confident, values, -1).argmax(axis=1)[confident.any(axis=1)]
    counts = labels[confident.any(axis=1)].T @ np.eye(3)[right]  # (recorded, right)
    joint = counts / counts.sum(axis=1, keepdims=True) * labels.sum(axis=0)[:, None]
    noise, place, rows = joint / joint.sum(axis=0), targets.argmax(axis=1), np.arange(len(targets))
    wrong: Floats = 1 - noise[place, place] * scores[rows, place] / (noise[place] * scores).sum(axis=1)
    return wrong


def suspects(name: str, out: Path, share: float) -> dict[str, Any]:
    """What the ranking and the training on soft labels are worth for a model."""
    config = config_of(name, out)
    cross_validate(config, resume=True)
    run, file = output_of(config), out / f"{name}-suspects.parquet"
    report = find_suspects(run)
    write_suspects(file, report)
    planted = {*pl.read_csv(out / "data" / FLIPS, schema_overrides={"id": pl.String})["id"]}
    hits = [row in planted for row in report.rows["id"]]
    soft = run.with_name(f"{name}-soft-labels")
    again = config_of(name, out, f"data.soft_labels={config.data.name_of(file)}", f"output_dir={soft}")
    cross_validate(again, resume=True)
    common = open_runs([run, soft])
    flipped = np.array([row in planted for row in common.ids])
    before, after = (row_losses(scored.probabilities, common.targets)[~flipped] for scored in common.runs)
    test, prompts = on_test_rows(out, {"before": run, "after": soft})
    published = as_published(common.runs[0].probabilities, common.targets)
    return {
        "published_100": float(flipped[np.argsort(-published, kind="stable")[:100]].mean()),
        "published_expected": float(published.sum()),
        "ceiling_100": ceiling(out, common.ids, common.targets, flipped, share),
        **{f"precision_{count}": float(np.mean(hits[:count])) for count in (50, 100, 200)},
        "mean_p_100": float(report.rows["p_wrong"].head(100).mean()),  # type: ignore[arg-type]
        "rate": report.rate,
        "expected": report.expected,
        "planted": len(planted),
        "clean_rows": [float(before.mean()), float(after.mean())],
        "clean_rows_difference": as_figures(difference(after, before, common.groups[~flipped])),
        "test_rows": [float(test["before"].mean()), float(test["after"].mean())],
        "test_rows_difference": as_figures(difference(test["after"], test["before"], prompts)),
    }


def taught(teacher: str, out: Path) -> dict[str, Any]:
    """What the classical student loses against a teacher."""
    config = config_of(teacher, out)
    assert bundles_of(config)
    result = distill(plan_students([output_of(config)], shipped(MODELS["classical"][0])))
    runs = {"teacher": output_of(config), "student": result.folder / TAUGHT, "untaught": result.folder / UNTAUGHT}
    test, prompts = on_test_rows(out, runs)
    figures = result.as_dict()
    return {
        **{name: figures[name] for name in ("log_loss", "rows_per_second")},
        "cost": as_figures(result.cost),
        "gain": as_figures(result.gain),
        "test_rows": {name: float(loss.mean()) for name, loss in test.items()},
        "test_rows_cost": as_figures(difference(test["student"], test["teacher"], prompts)),
        "test_rows_gain": as_figures(difference(test["student"], test["untaught"], prompts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--flips", type=float, default=0.1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    options = parser.parse_args()
    if not (options.out / "data" / FLIPS).exists():
        write_rows(options.out / "data", options.rows, options.flips)
    figures: dict[str, Any] = {"rows": options.rows, "flips": options.flips}
    for name in options.models:
        figures[name] = suspects(name, options.out, options.flips)
        stdout.print(f"{name}: {json.dumps(figures[name])}", soft_wrap=True)
    for name in options.models:
        if name != "classical":
            figures[f"distilled_from_{name}"] = taught(name, options.out)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
