"""How often equals are called different, and planted differences are found, on scores like those of the arena.

    python benchmarks/compare.py [--rows 4000] [--trials 200] [--gain 0.01]

A trial takes rows of the synthetic arena, with prompts, true probabilities and labels, and makes models whose logits
err around the truth: with an error that all models share, and one of their own. In an A/A trial two models err equally;
in an A/B trial the second has so much more of the shared error that its expected log loss is `--gain` worse. The
functions of `pairclf compare` decide. Also measured: five equals together, and equals that differ by their seed, where
the noise of seeds is known from one pair or two, or left out. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pairclf.console import stdout
from pairclf.demo.arena import generate
from pairclf.scores.intervals import Estimate, estimate, mean_of
from pairclf.scores.metrics import Floats, log_loss, row_losses
from pairclf.scores.probabilities import logits_of, probabilities
from pairclf.scores.significance import SeedNoise, decide, seed_noise
from pairclf.task import LMSYS

DRAWS = 500
"""Enough for a standard deviation, by which differences are judged."""

DRIFTS = (0.05, 0.1)
"""Seeds whose confidence varies by so much: their log loss then varies by the sampling noise of two models, or more."""

SHARED, OWN = 0.5, 0.17
"""Standard deviations of the errors in each logit, shared by all models and a model's own: losses of two models then
differ by 0.17 nats from row to row. Between classical runs on the arena it was 0.13 to 0.23."""


@dataclass(frozen=True)
class Trial:
    """Rows of the arena with prompts, true probabilities `(N, 3)`, labels, and a generator for models."""

    groups: NDArray[np.int64]
    truth: Floats
    targets: Floats
    shared: Floats
    generator: np.random.Generator

    def model(self, shared: float = SHARED, drift: float = 0.0) -> Floats:
        """Logits `(N, 3)`; `drift` is the standard deviation of the log of the model's confidence between seeds."""
        error = shared * self.shared + OWN * errors(self.groups, self.generator)
        return np.exp(drift * self.generator.normal()) * (logits_of(self.truth, LMSYS) + error)


def errors(groups: NDArray[np.int64], generator: np.random.Generator) -> Floats:
    """Standard normal errors `(N, 3)`, whose variance a prompt's rows share to three tenths."""
    by_prompt = generator.normal(size=(int(groups.max()) + 1, 3))[groups]
    mixed: Floats = np.sqrt(0.3) * by_prompt + np.sqrt(0.7) * generator.normal(size=(len(groups), 3))
    return mixed


def trial_of(rows: int, seed: int) -> Trial:
    """Fresh rows of the arena."""
    arena, generator = generate(rows, seed=seed), np.random.default_rng(seed)
    _, groups = np.unique(["\n".join(turn or "" for turn in row.prompt) for row in arena.rows], return_inverse=True)
    targets = np.eye(3)[[row.label for row in arena.rows]]
    return Trial(groups, arena.truth, targets, errors(groups, generator), generator)


def figures_of(rows: Trial, models: Sequence[Floats], seed: int) -> list[Estimate]:
    """The log loss of each model, with shared draws."""
    statistics = {
        str(place): mean_of(row_losses(probabilities(logits, LMSYS), rows.targets))
        for place, logits in enumerate(models)
    }
    return list(estimate(statistics, rows.groups, draws=DRAWS, seed=seed).values())


def is_called(figures: Sequence[Estimate], n: int, noise: SeedNoise | None = None) -> bool:
    """Whether some model is called worse than the best."""
    best = min(figures, key=lambda figure: figure.value)
    gaps = [Estimate(one.value - best.value, one.draws - best.draws) for one in figures if one is not best]
    return any(decide(gap, n, noise=noise, compared=len(figures)).is_real for gap in gaps)


def worse_by(gain: float, rows: int = 100_000) -> float:
    """The shared error of a model whose expected log loss is `gain` worse than with `SHARED`."""
    many = trial_of(rows, 10_000)

    def expected(shared: float) -> float:
        return log_loss(probabilities(many.model(shared), LMSYS), many.truth)

    low, high, goal = SHARED, 2 * SHARED, expected(SHARED) + gain
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if expected(middle) > goal else (middle, high)
    return (low + high) / 2


def outcomes_of(trial: Trial, worse: float, seed: int, drifts: Sequence[float]) -> dict[str, float]:
    """Which differences are called in a trial, by its kind; and how much losses of equals differ from row to row."""
    n, models = len(trial.groups), [trial.model() for _ in range(5)]
    figures = figures_of(trial, [*models, trial.model(worse)], seed)
    losses = [row_losses(probabilities(logits, LMSYS), trial.targets) for logits in models[:2]]
    outcomes: dict[str, float] = {
        "row_deviation": float((losses[0] - losses[1]).std()),
        "equal": is_called(figures[:2], n),
        "five_equal": is_called(figures[:5], n),
        "planted": is_called([figures[0], figures[5]], n) and figures[0].value < figures[5].value,
    }
    for drift in drifts:
        seeds = figures_of(trial, [trial.model(drift=drift) for _ in range(6)], seed)
        outcomes[f"seeds_{drift}_left_out"] = is_called(seeds[:2], n)
        for pairs in (1, 2):
            noise = seed_noise([seeds[2 + 2 * pair : 4 + 2 * pair] for pair in range(pairs)])
            outcomes[f"seeds_{drift}_{pairs}_pairs"] = is_called(seeds[:2], n, noise)
    return outcomes


def measured(rows: int, trials: int, gain: float, drifts: Sequence[float] = DRIFTS) -> dict[str, float]:
    """The means of `outcomes_of` over trials."""
    worse = worse_by(gain)
    outcomes = [outcomes_of(trial_of(rows, seed), worse, seed, drifts) for seed in range(trials)]
    return {name: round(float(np.mean([one[name] for one in outcomes])), 4) for name in outcomes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--gain", type=float, default=0.01)
    options = parser.parse_args()
    shares = measured(options.rows, options.trials, options.gain)
    for name, share in shares.items():
        stdout.print(f"{name:<24} {share:.3f}")
    print(json.dumps({"rows": options.rows, "trials": options.trials, "gain": options.gain, **shares}))


if __name__ == "__main__":
    main()
