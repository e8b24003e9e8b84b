"""The last week's promises in figures, on the synthetic arena: plans, labels, forecasts, and the guide as a whole.

    python benchmarks/lastweek.py blend --out runs/lastweek [--rows 2000] [--deadlines 0.25 0.5 0.75]
    python benchmarks/lastweek.py labels --out runs/lastweek-labels [--rows 4000] [--flips 0.1] [--models classical]
    python benchmarks/lastweek.py forecast [--sets 200] [--rows 1500] [--hidden 900] [--share 0.3] [--shifts none long]
    python benchmarks/lastweek.py guide --out runs/guide

`blend`: four classical models are cross-validated, and the plans of `pairclf blend --deadline` are found from labels.
Each plan that can be written is then judged by the true probabilities of the same rows. Regret: the chosen plan's loss
against the truth, less that of the best plan in time by truth, each with the weights that `blend` fits to the labels.
Deadlines are parts of the time of all models in both orders; `shuffled` is the mean regret of all plans in time, which
is what a choice by lot loses.

`labels`: of the training rows, a share has its winner exchanged. Each model is cross-validated on them; `pairclf
suspects` ranks the labels (precision@100: which of the first 100 were planted; the ceiling is that of the true
probabilities), and the same model is trained again on its soft labels. Both are judged on the rows that were left
clean, out of fold, and on the test rows against their true probabilities, which no model has seen. Then `pairclf
distill` teaches the classical model by the demo's. Differences are paired, with half of their 95% interval by prompt.

`forecast`: a model of known quality is simulated: the arena's true probabilities, whose logits get noise that grows
with the prompt's length. Each of the sets draws held-out rows and hidden rows anew, from different prompts; with the
shift, a long prompt is three times as likely among the hidden ones. The forecast sees the held-out scores and labels,
and the hidden texts. Counted is how often the 90% interval holds the score of the public and the private part;
`unweighted` is the same forecast that ignores the shift.

`guide`: the commands of the guide in docs/last-week.md, as they stand there, in the folder; and what each step gained
on 6,000 hidden rows, beside what it was foretold to gain.

Finished trainings are kept: the same command continues. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.config import Config, load_config
from pairclf.console import progress, stdout
from pairclf.data.folds import prompt_groups
from pairclf.data.rows import read_rows, rows_in_memory
from pairclf.data.scores import class_matrix, read_scores
from pairclf.demo.arena import Arena, generate, write_lmsys
from pairclf.inference.ensemble import read_ensemble
from pairclf.inference.forecast import pass_seconds
from pairclf.inference.predict import predict
from pairclf.own_files import shipped
from pairclf.run import bundles_of, output_of
from pairclf.runs.cv import cross_validate
from pairclf.runs.distill import TAUGHT, UNTAUGHT, distill, plan_students
from pairclf.runs.held_out import CommonRows, open_runs
from pairclf.runs.plan import plannable
from pairclf.runs.suspects import find_suspects, write_suspects
from pairclf.runs.text_shift import LENGTHS, shift_of_features, text_features
from pairclf.scores.intervals import Estimate, difference, mean_of
from pairclf.scores.metrics import Floats, row_losses
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
from pairclf.scores.probabilities import probabilities
from pairclf.scores.score_forecast import ScoreDraws, draw_scores, interval_of
from pairclf.task import LMSYS

CONFIG = "configs/demo/classical.yaml"
MODELS = ("logistic", "lightgbm", "nb", "svm")
TEST_ROWS, HIDDEN_ROWS, DEVICE = 400, 25_000, "t4x2"
FLIPS = "flips.csv"
LABEL_MODELS = {
    "classical": ("configs/demo/classical.yaml", ["folds.n_splits=5"]),
    "demo": ("configs/demo/gemma2-tiny.yaml", []),
}
"""Config and settings of each model: LightGBM in five folds, and the demo's model in its two."""
POOL, FOLDS, DRAWS = 16_000, 5, 500
SHIFTS = {"none": False, "long": True}


def as_figures(gap: Estimate) -> dict[str, float]:
    """A difference with half of its interval."""
    return {"value": round(gap.value, 4), "half": round((gap.high - gap.low) / 2, 4)}


# --- plans ------------------------------------------------------------------------------------------------------------


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


def blend_regret(options: argparse.Namespace) -> dict[str, Any]:
    """What the plans that labels choose lose by truth."""
    out, rows = options.out, options.rows
    common = runs_of(out, rows)
    costs = [
        Seconds(*pass_seconds(run.bundles[0], out / "data/test.csv", device=DEVICE, rows=HIDDEN_ROWS))
        for run in common.runs
    ]
    data = plannable(common, costs)
    truth = replace(data.rows, targets=truth_of(out, common.ids))
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
        "deadlines": [_regret(part, part * total, front, by_truth) for part in options.deadlines],
        "shares": SHARES,
        "swap_shares": SWAP_SHARES,
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


# --- labels -----------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, rows: int, share: float, seed: int = 0) -> None:
    """Write an arena with planted errors, and their ids as `flips.csv`."""
    arena = generate(rows + TEST_ROWS, seed=seed)
    training, _ = arena.split(TEST_ROWS)
    decided = [row.id for row in training.rows if row.label < 2]
    flipped = {*np.random.default_rng(seed).choice(decided, size=round(share * len(training.rows)), replace=False)}
    changed = [replace(row, label=1 - row.label) if row.id in flipped else row for row in arena.rows]
    write_lmsys(Arena(tuple(changed)), folder, n_test=TEST_ROWS)
    pl.DataFrame({"id": sorted(flipped)}).write_csv(folder / FLIPS)


def config_of_model(name: str, out: Path, *more: str) -> Config:
    """The config of a model on the planted rows."""
    path, settings = LABEL_MODELS[name]
    data = [f"data.folder={out / 'data'}", "data.test=null", "data.sample_submission=null"]
    return load_config(shipped(path), [*data, f"output_dir={out / name}", *settings, *more])


def truth_of(out: Path, ids: Sequence[str], data: Path = Path("data")) -> Floats:
    """True probabilities `(N, 3)` of rows, in their order."""
    known = pl.read_parquet(out / data / "truth.parquet")
    frame = pl.DataFrame({"id": list(ids)}).join(known, on="id", how="left", maintain_order="left")
    return class_matrix(frame, LMSYS)


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
    config = config_of_model(name, out)
    cross_validate(config, resume=True)
    run, file = output_of(config), out / f"{name}-suspects.parquet"
    report = find_suspects(run)
    write_suspects(file, report)
    planted = {*pl.read_csv(out / "data" / FLIPS, schema_overrides={"id": pl.String})["id"]}
    hits = [row in planted for row in report.rows["id"]]
    soft = run.with_name(f"{name}-soft-labels")
    again = config_of_model(name, out, f"data.soft_labels={config.data.name_of(file)}", f"output_dir={soft}")
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
    config = config_of_model(teacher, out)
    assert bundles_of(config)
    result = distill(plan_students([output_of(config)], shipped(LABEL_MODELS["classical"][0])))
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


def labels(options: argparse.Namespace) -> dict[str, Any]:
    """Planted errors, and a distilled student."""
    if not (options.out / "data" / FLIPS).exists():
        write_rows(options.out / "data", options.rows, options.flips)
    figures: dict[str, Any] = {"rows": options.rows, "flips": options.flips}
    for name in options.models:
        figures[name] = suspects(name, options.out, options.flips)
        stdout.print(f"{name}: {json.dumps(figures[name])}", soft_wrap=True)
    for name in options.models:
        if name != "classical":
            figures[f"distilled_from_{name}"] = taught(name, options.out)
    return figures


# --- forecasts --------------------------------------------------------------------------------------------------------


class Pool:
    """Rows to draw from: `(N,)` losses, prompts' numbers and lengths, and texts' features."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        arena = generate(rows, seed=seed)
        table = {"id": [row.id for row in arena.rows]}
        for name in LMSYS.fields:
            table[name] = [json.dumps(getattr(row, name)) for row in arena.rows]
        frame = rows_in_memory(pl.DataFrame(table), LMSYS)
        self.groups = np.unique(prompt_groups(frame, LMSYS).to_numpy().astype(np.str_), return_inverse=True)[1]
        characters = frame.select(pl.col("prompt").list.join("\n").str.len_chars())["prompt"].to_numpy()
        self.long = characters > np.quantile(characters, 2 / 3)
        generator = np.random.default_rng(seed)
        noise = generator.normal(size=(rows, 3)) * np.where(self.long, 1.2, 0.4)[:, None]
        truth = arena.truth
        labels = np.eye(3)[[row.label for row in arena.rows]]
        self.losses: Floats = row_losses(probabilities(np.log(truth) + noise, LMSYS), labels)
        self.features = text_features(frame, LMSYS)


def drawn(pool: Pool, seed: int, rows: int, hidden: int, shifted: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Places of held-out and of hidden rows, which share no prompt."""
    generator = np.random.default_rng(seed)
    side = generator.random(pool.groups.max() + 1)[pool.groups] < 0.6
    chance = np.where(pool.long & shifted, 3.0, 1.0) * ~side
    held = generator.choice(np.flatnonzero(side), rows, replace=False)
    return held, generator.choice(len(side), hidden, replace=False, p=chance / chance.sum())


def holds(draws: ScoreDraws, public: float, private: float) -> tuple[bool, bool]:
    """Whether the intervals of the one run hold the scores of the hidden rows."""
    intervals = interval_of(draws.public[:, 0]), interval_of(draws.private[:, 0])
    inside = [own.low <= score <= own.high for own, score in zip(intervals, (public, private), strict=True)]
    return inside[0], inside[1]


def one_set(pool: Pool, seed: int, options: argparse.Namespace, shifted: bool) -> dict[str, Any]:
    """Forecast one hidden set, with the measured shift and without it."""
    held, hidden = drawn(pool, seed, options.rows, options.hidden, shifted)
    split = round(options.share * options.hidden)
    scores = [float(pool.losses[part].mean()) for part in (hidden[:split], hidden[split:])]
    both = np.concatenate([held, hidden])
    is_hidden = np.arange(len(both)) >= len(held)
    lengths = len(LENGTHS) * len(LMSYS.fields)
    groups = pool.groups[both]
    shift = shift_of_features(pool.features[both], is_hidden, groups, groups % FOLDS, lengths)
    found: dict[str, Any] = {"auc": shift.area.value, "found": shift.found, "effective_rows": shift.effective_rows}
    for name, importance in (("forecast", shift.importance), ("unweighted", None)):
        draws = draw_scores(
            [mean_of(pool.losses[held])],
            pool.groups[held],
            importance=importance,
            public_rows=split,
            private_rows=options.hidden - split,
            draws=DRAWS,
            seed=seed,
        )
        found[f"{name}_public"], found[f"{name}_private"] = holds(draws, *scores)
        found[f"{name}_error"] = float(draws.private.mean()) - scores[1]
    return found


def forecast(options: argparse.Namespace) -> dict[str, Any]:
    """Coverage of the intervals, with each shift."""
    pool = Pool(POOL)
    figures: dict[str, Any] = {"rows": options.rows, "hidden": options.hidden, "sets": options.sets}
    for name in options.shifts:
        sets = []
        with progress(name, options.sets) as advance:
            for seed in range(options.seed, options.seed + options.sets):
                sets.append(one_set(pool, seed, options, SHIFTS[name]))
                advance()
        figures[name] = {key: round(float(np.mean([own[key] for own in sets])), 4) for key in sets[0]}
        stdout.print(f"{name}: {json.dumps(figures[name])}", soft_wrap=True)
    return figures


# --- the guide -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = Path("data/hidden")
RUNS, FILES = ("runs/trees", "runs/linear", "runs/soft"), ("calibrated.yaml", "ensemble.yaml", "plan.yaml")


def guide_commands() -> list[list[str]]:
    """The arguments of the guide's commands up to the picks; those behind need an account on Kaggle."""
    text = (ROOT / "docs/last-week.md").read_text(encoding="utf-8")
    guide = text.partition("## From two runs")[2].partition("### What each step")[0]
    lines = [line.strip() for line in guide.splitlines() if line.startswith("    pairclf ")]
    commands = [shlex.split(line)[1:] for line in lines]
    return commands[: [command[0] for command in commands].index("package")]


def hidden_losses(truth: Floats, path: str) -> tuple[Floats, Floats]:
    """Of the hidden rows, `(N,)` each, by a run's bundles or an ensemble's file: against the truth, and the scores."""
    bundles = sorted(Path(path).glob("fold*/bundle")) or [Path(path)]
    scores = Path(f"{path}-hidden.parquet")
    predict(bundles, HIDDEN / "test.csv", scores.with_suffix(".csv"), scores=scores, resume=False)
    values = class_matrix(read_scores(scores, LMSYS).sort("id"), LMSYS)
    return row_losses(values, truth), values


def guide(options: argparse.Namespace) -> dict[str, Any]:
    """Foretold and true gains of the guide's steps."""
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    if not Path("configs").exists():
        Path("configs").symlink_to(ROOT / "configs")
    hidden = generate(6_100, seed=1)
    write_lmsys(generate(4_001, seed=0), Path("data/arena"), n_test=1)
    write_lmsys(hidden, HIDDEN, n_test=6_000)
    expected: dict[str, Any] = {}
    for arguments in guide_commands():
        more = ["--json"] if arguments[0] == "forecast-score" else []
        done = subprocess.run([sys.executable, "-m", "pairclf", *arguments, *more], stdout=subprocess.PIPE, check=True)
        if more:
            expected = json.loads(done.stdout)
    rows = read_rows([HIDDEN / "test.csv"], LMSYS, labelled=False).sort("id")
    ids, prompts = rows["id"].to_list(), prompt_groups(rows, LMSYS).to_list()
    truth = truth_of(Path(), ids, HIDDEN)
    labels = {row.id: row.label for row in hidden.rows}
    targets = np.eye(3)[[labels[row] for row in ids]]
    scored = {path: hidden_losses(truth, path) for path in (*RUNS, *FILES)}
    files = {path: read_ensemble([Path(path)]) for path in FILES}
    held = open_runs([Path(run) for run in RUNS])
    losses = {run.name: row_losses(run.probabilities, held.targets) for run in held.runs}

    def gain(before: str, after: str, foretold: float | None = None) -> dict[str, Any]:
        """Of two runs, the foretold gain is that of their held-out rows."""
        true = as_figures(difference(scored[before][0], scored[after][0], prompts))
        if foretold is not None:
            return {"foretold": foretold, "true": true}
        first, second = (losses[Path(run).name] for run in (before, after))
        return {"foretold": as_figures(difference(first, second, held.groups)), "true": true}

    nested = {path: file.nested.gain for path, file in files.items() if file.nested is not None}
    single = min(RUNS, key=lambda run: losses[Path(run).name].mean())
    plan_loss = files["plan.yaml"].out_of_fold["log_loss"] - files["ensemble.yaml"].out_of_fold["log_loss"]
    public = np.random.default_rng(0).permutation(len(ids)) < expected["public_rows"]
    real = {path: row_losses(values, targets) for path, (_, values) in scored.items()}
    return {
        "entropy": float(row_losses(truth, truth).mean()),
        "true_loss": {path: float(loss.mean()) for path, (loss, _) in scored.items()},
        "better_run": gain("runs/linear", "runs/trees"),
        "soft": gain("runs/trees", "runs/soft"),
        "calibrated": gain("runs/soft", "calibrated.yaml", nested["calibrated.yaml"]),
        "blend": gain(single, "ensemble.yaml", nested["ensemble.yaml"]),
        "plan": gain("ensemble.yaml", "plan.yaml", -plan_loss),
        "forecast": {
            run["name"]: {
                "public": [run["public"], float(real[_path(run["name"])][public].mean())],
                "private": [run["private"], float(real[_path(run["name"])][~public].mean())],
            }
            for run in expected["runs"]
        },
        "picks": expected["picks"],
    }


def _path(name: str) -> str:
    return name if name in FILES else f"runs/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    commands = {name: parts.add_parser(name) for name in ("blend", "labels", "forecast", "guide")}
    for name, rows in (("blend", 2000), ("labels", 4000), ("forecast", 1500)):
        commands[name].add_argument("--rows", type=int, default=rows)
    for name in ("blend", "labels", "guide"):
        commands[name].add_argument("--out", type=Path, required=True)
    commands["blend"].add_argument("--deadlines", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    commands["labels"].add_argument("--flips", type=float, default=0.1)
    commands["labels"].add_argument("--models", nargs="+", choices=LABEL_MODELS, default=[*LABEL_MODELS])
    commands["forecast"].add_argument("--sets", type=int, default=200)
    commands["forecast"].add_argument("--seed", type=int, default=0, help="of the first set")
    commands["forecast"].add_argument("--hidden", type=int, default=900)
    commands["forecast"].add_argument("--share", type=float, default=0.3)
    commands["forecast"].add_argument("--shifts", nargs="+", choices=SHIFTS, default=[*SHIFTS])
    options = parser.parse_args()
    print(json.dumps({options.part: PARTS[options.part](options)}))


PARTS = {"blend": blend_regret, "labels": labels, "forecast": forecast, "guide": guide}


if __name__ == "__main__":
    main()
