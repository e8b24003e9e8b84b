"""Successive halving of a sweep: train fold by fold, and drop settings that can't be the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pairclf.console import console
from pairclf.errors import ConfigError
from pairclf.runs.compare import minus
from pairclf.runs.sweep import SEED, Arm, Departure, Sweep, alike, figures_of_arms, mean_figure
from pairclf.scores.figures import METRICS
from pairclf.scores.significance import decide, seed_noise


def halve_arms(sweep: Sweep, train: Callable[[Sweep], list[Arm]]) -> tuple[list[Arm], list[Departure]]:
    """Train fold by fold; after each fold but the last, settings leave that can't be the best.

    Runs that differ by their seed alone stay or leave together, by their mean. No more than half leave at a time, and
    only those whose paired difference to the best is real. The same runs give the same departures, so that the same
    command continues.

    Args:
        sweep: from `plan_sweep`.
        train: trains what is not finished of a sweep, and returns the runs that are.

    Returns:
        The runs that are finished on all folds, and who left.

    Raises:
        ConfigError: the sweep has one fold.
    """
    if len(sweep.folds) < 2:
        raise ConfigError(
            "--halving goes fold by fold, and the sweep has one", remedy="e.g. --fold 0 --fold 1 --fold 2"
        )
    arms, left = sweep.arms, list[Departure]()
    for count in range(1, len(sweep.folds)):
        part = replace(sweep, arms=arms, folds=sweep.folds[:count])
        finished = train(part)
        if len(finished) < len(arms):  # out of time, or one failed: nobody is judged
            return [arm for arm in finished if arm.is_trained(sweep.folds)], left
        gone = _departures(finished, part.folds)
        arms = [arm for arm in arms if _unseeded(arm) not in [one.settings for one in gone]]
        for one in gone:
            console.print(f"{one.settings} leaves: {one.to_best:+.4f} against the best, real from {one.threshold:.4f}")
        left += gone
    return train(replace(sweep, arms=arms)), left


def _unseeded(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in arm.settings.items() if key != SEED}


def _departures(arms: Sequence[Arm], folds: Sequence[int]) -> list[Departure]:
    """Of the worse half, those that are really worse than the best."""
    common, by_arm = figures_of_arms(arms, folds)
    places = alike(arms, [SEED])
    groups = [[by_arm[place] for place in group] for group in places]
    means, sign = [mean_figure(group) for group in groups], -METRICS[common.task.metric].better
    order = sorted(range(len(groups)), key=lambda place: sign * means[place].value)
    noise, gone = seed_noise(groups), []
    for place in order[(len(order) + 1) // 2 :]:
        gap, seeds = minus(means[place], means[order[0]], sign), len(groups[place])
        decision = decide(gap, len(common.ids), noise=noise, compared=len(order), seeds=seeds)
        if decision.is_real:
            settings = _unseeded(arms[places[place][0]])
            gone.append(Departure(settings, list(folds), decision.value, decision.threshold))
    return gone
