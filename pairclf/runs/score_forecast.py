"""What the leaderboard will say: intervals of public and private scores of runs and blends, and two final picks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pairclf.console import Tables, counted, number, progress, table
from pairclf.data.rows import read_rows
from pairclf.errors import ConfigError
from pairclf.runs.held_out import CommonRows
from pairclf.runs.text_shift import measure_shift
from pairclf.scores.figures import METRICS, finite, judge, metrics_of, title
from pairclf.scores.score_forecast import (
    DRAWS,
    LEVEL,
    FinalPicks,
    ScoreInterval,
    TextShift,
    draw_scores,
    interval_of,
    pick_two,
)
from pairclf.task import Task, competition, hidden_rows_of

FEWEST = 100
"""Rows of a test file from which it counts as the hidden test: Kaggle shows a few rows in place of a hidden one."""


@dataclass(frozen=True, slots=True)
class ForecastRun:
    """A run's forecast scores.

    Attributes:
        name: of the run.
        held_out: the score of its held-out rows, as they are.
        public: of the public part.
        private: of the private part.
    """

    name: str
    held_out: float
    public: ScoreInterval
    private: ScoreInterval


@dataclass(frozen=True, slots=True, eq=False)
class ScoreForecast(Tables):
    """Forecasts of all runs.

    Attributes:
        task: its metric is forecast.
        rows: held-out rows.
        prompts: groups of held-out rows with one prompt.
        public_rows: rows of the public part.
        private_rows: rows of the private part.
        share_of: the competition whose public share it is; empty: the share was given.
        runs: in the order given.
        shift: between held-out and hidden texts; None: it was not measured, and `unmeasured` says why.
        unmeasured: why the shift is not known; empty: it is.
        picks: the two submissions to choose.
    """

    task: Task
    rows: int
    prompts: int
    public_rows: int
    private_rows: int
    share_of: str
    runs: list[ForecastRun]
    shift: TextShift | None
    unmeasured: str
    picks: FinalPicks

    def tables(self) -> list[Table]:
        return [render(self)]

    @property
    def remarks(self) -> list[str]:
        """What the intervals assume, and the picks with their reasons, in words."""
        return [*_remarks(self)]

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them."""
        shift, picks = self.shift, self.picks
        return {
            "metric": self.task.metric,
            "level": LEVEL,
            "rows": self.rows,
            "prompts": self.prompts,
            "public_rows": self.public_rows,
            "private_rows": self.private_rows,
            "shift": None
            if shift is None
            else {
                "auc": {name: finite(getattr(shift.area, name)) for name in ("value", "low", "high")},
                "weighted": shift.found,
                "effective_rows": shift.effective_rows,
            },
            "runs": [
                {
                    "name": run.name,
                    "held_out": finite(run.held_out),
                    "public": _finite(run.public),
                    "private": _finite(run.private),
                }
                for run in self.runs
            ],
            "picks": {
                "first": self.runs[picks.first].name,
                "second": None if picks.second is None else self.runs[picks.second].name,
                "gain": picks.gain,
                "second_is_better": picks.chance,
            },
            "remarks": self.remarks,
        }


def _finite(interval: ScoreInterval) -> dict[str, Any]:
    return {name: finite(value) for name, value in asdict(interval).items()}


def forecast_scores(
    common: CommonRows, *, public_share: float | None = None, data: Path | None = None, hidden_rows: int | None = None
) -> ScoreForecast:
    """Forecast the task's metric on the public and the private rows.

    Args:
        common: the runs on their common rows.
        public_share: part of the hidden rows that the public leaderboard has, between 0 and 1; None: that of the
            competition of the first run's `package`.
        data: file of hidden rows, or rows like them; None: `data.test`.
        hidden_rows: rows of the hidden test; None: those of `data`, or of the competition where it has fewer than
            `FEWEST`.

    Raises:
        ConfigError: a size can't be used, there is no such file, or as `check_metric`.
        DataError: as `draw_scores`, or the file can't be read.
    """
    task = common.task
    metric = METRICS[metrics_of(task)[0]]
    share, share_of = _share(common, public_share)
    shift, seen, unmeasured = _shift(common, data)
    rows = hidden_rows or (seen if seen >= FEWEST else hidden_rows_of(task))
    if rows < 2:
        raise ConfigError(f"--rows {rows} can't be parted into public and private rows", remedy="give 2 or more")
    public = min(max(1, round(rows * share)), rows - 1)
    judged = [judge(run.probabilities, common.targets, task, common.weights) for run in common.runs]
    statistics = [metric.statistic(own) for own in judged]
    with progress("drawing hidden sets", DRAWS) as advance:
        drawn = draw_scores(
            statistics,
            common.groups,
            common.weights,
            importance=None if shift is None else shift.importance,
            public_rows=public,
            private_rows=rows - public,
            advance=advance,
        )
    return ScoreForecast(
        task=task,
        rows=len(common.ids),
        prompts=len(np.unique(common.groups)),
        public_rows=public,
        private_rows=rows - public,
        share_of=share_of,
        runs=[
            ForecastRun(
                run.name,
                statistic.value(common.weights),
                interval_of(drawn.public[:, place]),
                interval_of(drawn.private[:, place]),
            )
            for place, (run, statistic) in enumerate(zip(common.runs, statistics, strict=True))
        ],
        shift=shift,
        unmeasured=unmeasured,
        picks=pick_two(drawn.private, metric.better),
    )


def _share(common: CommonRows, given: float | None) -> tuple[float, str]:
    """The public share, and the competition whose share it is, where none is given."""
    slug = common.config.package.competition
    known = competition(slug)
    if given is None and known is not None and known.public_share is not None and known.task == common.task:
        return known.public_share, slug
    if given is None or not 0 < given < 1:
        raise ConfigError(
            f"the public part of task {common.task.name} is not known"
            if given is None
            else f"--public-share {given} must be between 0 and 1, without both",
            remedy="the leaderboard's page says which part of the test data it is calculated with: --public-share 0.3 "
            "for 30%",
        )
    return given, ""


def _shift(common: CommonRows, data: Path | None) -> tuple[TextShift | None, int, str]:
    """The shift, the number of rows in the file, and why the shift is not known."""
    settings = common.config.data
    file = data or settings.test_file
    if file is None:
        return None, 0, "data.test names no file; give --data"
    if not file.is_file():
        if data is not None:
            raise ConfigError(f"--data {file} is no file", remedy="give the competition's test file")
        return None, 0, f"{file} is not there; give --data"
    hidden = read_rows([settings.unlabelled(file)], common.task, labelled=False, group=common.config.folds.group)
    if len(hidden) < FEWEST:
        return None, len(hidden), f"{file} has {counted(len(hidden), 'row')}, and {FEWEST} are needed"
    found = measure_shift(common.frame, hidden, common.task)
    return found, len(hidden), "" if found else "the rows have too few prompts"


def render(forecast: ScoreForecast) -> Table:
    """The runs with their intervals."""
    name = title(forecast.task.metric, forecast.task)
    direction = METRICS[forecast.task.metric].direction
    shown = table(
        f"{name} ({direction}), {LEVEL:.0%} intervals",
        "run",
        "held out",
        f"public, {forecast.public_rows:,} rows",
        f"private, {forecast.private_rows:,} rows",
    )
    for run in forecast.runs:
        shown.add_row(run.name, number(run.held_out), _words(run.public), _words(run.private))
    return shown


def _words(interval: ScoreInterval) -> str:
    if math.isnan(interval.mean):
        return "-"
    return f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"


def _remarks(forecast: ScoreForecast) -> Iterator[str]:
    shift, picks = forecast.shift, forecast.picks
    if forecast.share_of:
        share = forecast.public_rows / (forecast.public_rows + forecast.private_rows)
        yield f"public part: {share:.0%} of the hidden rows, as in {forecast.share_of}; --public-share gives another"
    if shift is None:
        yield f"shift between held-out and hidden texts: not measured ({forecast.unmeasured}); none is assumed"
    else:
        area = f"AUC {shift.area.value:.3f} ({shift.area.low:.3f} to {shift.area.high:.3f})"
        if shift.found:
            yield (
                f"shift: a classifier tells hidden texts from held-out ones ({area}), so rows like the hidden ones "
                f"count for more; {shift.effective_rows:,.0f} effective rows of {forecast.rows:,}"
            )
        else:
            yield f"shift: none that a classifier finds ({area}); {forecast.rows:,} rows count alike"
    yield (
        "held-out scores are of models of single folds; a mean over the folds' models, or a model of all rows, is "
        "mostly a little better, and no gain is assumed"
    )
    first = forecast.runs[picks.first].name
    yield f"first pick: {first}, which has the best mean private score"
    if picks.second is not None:
        second = forecast.runs[picks.second].name
        yield (
            f"second pick: {second}, which beats {first} in {picks.chance:.0%} of the drawn private sets: the better "
            f"of both is {picks.gain:.4f} better than {first} alone, on average, and no other run adds more"
        )
