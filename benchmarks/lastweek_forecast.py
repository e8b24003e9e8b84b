"""Coverage of `pairclf forecast-score` on the synthetic arena, with and without a planted shift.

    python benchmarks/lastweek_forecast.py [--sets 200] [--rows 1500] [--hidden 900] [--share 0.3] [--shifts none long]

A model of known quality is simulated: the arena's true probabilities, whose logits get noise that grows with the
prompt's length. Each of the sets draws held-out rows and hidden rows anew, from different prompts; with the shift, a
long prompt is three times as likely among the hidden ones. The forecast sees the held-out scores and labels, and the
hidden texts. Counted is how often the 90% interval holds the score of the public and the private part; `unweighted` is
the same forecast that ignores the shift. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.console import progress, stdout
from pairclf.data.folds import prompt_groups
from pairclf.data.rows import rows_in_memory
from pairclf.demo.arena import generate
from pairclf.runs.text_shift import LENGTHS, chances_of, text_features
from pairclf.scores.intervals import mean_of
from pairclf.scores.metrics import Floats, row_losses
from pairclf.scores.probabilities import probabilities
from pairclf.scores.score_forecast import ScoreDraws, draw_scores, interval_of, shift_of
from pairclf.task import LMSYS

POOL, FOLDS, DRAWS = 16_000, 5, 500
SHIFTS = {"none": False, "long": True}


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
    chances = chances_of(pool.features[both], is_hidden, pool.groups[both] % FOLDS, lengths)
    shift = shift_of(chances, is_hidden, pool.groups[both])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--hidden", type=int, default=900)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=[*SHIFTS])
    options = parser.parse_args()
    pool = Pool(POOL)
    figures: dict[str, Any] = {"rows": options.rows, "hidden": options.hidden, "sets": options.sets}
    for name in options.shifts:
        sets = []
        with progress(name, options.sets) as advance:
            for seed in range(options.sets):
                sets.append(one_set(pool, seed, options, SHIFTS[name]))
                advance()
        figures[name] = {key: round(float(np.mean([own[key] for own in sets])), 4) for key in sets[0]}
        stdout.print(f"{name}: {json.dumps(figures[name])}", soft_wrap=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
