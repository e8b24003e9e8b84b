"""The ledger: one line per submission, and how well out-of-fold scores predict the leaderboard.

`runs/ledger.jsonl` opens with `polars.read_ndjson`. It is always written as a whole, under a lock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pairclf.config import Section, checked
from pairclf.console import console, number, table
from pairclf.errors import ConfigError, PackagingError
from pairclf.files import check_file_target, locked, parsed, write_text
from pairclf.inference.ensemble import NestedFigures
from pairclf.page.html import document, printed
from pairclf.page.plots import Series, plot
from pairclf.publish.client import KaggleClient, WaitClock
from pairclf.scores.figures import METRICS
from pairclf.scores.metrics import Floats

_FEWEST = 3  # runs; of two, any correlation is 1


class ForecastIntervals(Section):
    """Where a submission's scores were expected, by `forecast-score`."""

    level: float = Field(description="probability that a score lies in its interval")
    public: tuple[float, float] = Field(description="lower and upper bound of the public score")
    private: tuple[float, float] = Field(description="of the private score")


class LedgerRow(Section):
    """One submission."""

    when: str = Field(description="UTC, when it was made")
    build: str = Field(description="the build's identity")
    config: str = Field(description="name of the run")
    competition: str = Field(description="its slug")
    metric: str = Field(description="what folds and out_of_fold are, and the leaderboard counts")
    folds: dict[str, float] = Field(description="of each bundle on the rows of its fold")
    out_of_fold: float | None = Field(None, description="over all folds' rows")
    nested: NestedFigures | None = Field(None, description="what calibration or blend gain; null: not known")
    public: float | None = Field(None, description="score on the public leaderboard")
    private: float | None = Field(None, description="on the private one, which Kaggle shows when the competition ends")
    forecast: ForecastIntervals | None = Field(None, description="of both scores; null: none was made")
    status: str = Field("PENDING", description="Kaggle's word: PENDING, COMPLETE or ERROR")
    error: str = Field("", description="what Kaggle says of a submission that was not scored")
    seconds: float | None = Field(None, description="of the notebook's run on Kaggle, or else of its rehearsal")
    bundles: list[str] = Field(description="seals of the bundles, SHA-256 in hex")
    message: str = Field(description="as it was submitted")
    kernel: str = Field(description="owner/slug/version")
    submission: int = Field(description="Kaggle's number for it")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def rows(path: Path) -> list[LedgerRow]:
    """All submissions, oldest first; empty if there is no file.

    Raises:
        PackagingError: a line is no JSON.
        ConfigError: a line is no submission.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PackagingError(f"{path} is no text: {error}", remedy="put an older copy in its place") from error
    return [_row(line, f"{path}, line {place}") for place, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str) -> LedgerRow:
    try:
        tree = parsed(line)
    except ValueError as error:
        raise PackagingError(
            f"a line of the ledger is no JSON: {error}", where=where, remedy="mend or remove it"
        ) from error
    if foreign := sorted(set(tree) - set(LedgerRow.model_fields)) if isinstance(tree, dict) else []:
        raise PackagingError(
            f"a line of the ledger has {', '.join(foreign)}, which no submission has",
            where=where,
            remedy="remove it; or read the ledger with the pairclf that wrote it",
        )
    return checked(LedgerRow, tree, where, "mend or remove the line")


def prepare(path: Path) -> None:
    """Check that the ledger can be read and written, before anything is submitted.

    Raises:
        PackagingError, ConfigError: see `rows`.
        PairclfError, OSError: no file can be written there.
    """
    check_file_target(path)
    with locked(_lock(path)):
        _write(path, rows(path))


def record(path: Path, row: LedgerRow) -> None:
    """Add a submission, unless its number is there."""
    with locked(_lock(path)):
        entries = rows(path)
        if row.submission not in [entry.submission for entry in entries]:
            _write(path, [*entries, row])


def update(path: Path, submission: int, answer: Mapping[str, Any]) -> None:
    """Write Kaggle's answer about a submission into its line.

    A number that is not in the ledger is ignored. `answer` has `status`, `publicScore`, `privateScore` and
    `errorDescription`.
    """
    with locked(_lock(path)):
        entries = rows(path)
        for row in entries:
            if row.submission == submission:
                row.status = str(answer["status"])
                row.error = str(answer.get("errorDescription") or "")
                row.public = _score(answer.get("publicScore"), row.public)
                row.private = _score(answer.get("privateScore"), row.private)
        _write(path, entries)


def refuse_empty(path: Path) -> None:
    """Check that the ledger lists a submission, before a long calculation that is to be written into it.

    Raises:
        ConfigError: it lists none, or there is no such file; or as `rows`.
        PackagingError: as `rows`.
    """
    if not rows(path):
        raise ConfigError(
            f"--ledger {path} lists no submission", remedy="give the file that `pairclf submit` wrote, or leave it out"
        )


def add_forecasts(path: Path, forecasts: Sequence[tuple[Collection[str], bool, ForecastIntervals]]) -> int:
    """Write intervals into the lines of the submissions that they are of, and return their number.

    A forecast comes with the seals of its bundles, and whether a submission of it has all of them (a blend), or any
    (a run, of which some folds may be submitted).

    Raises:
        PackagingError, ConfigError: see `rows`.
    """
    found = 0
    with locked(_lock(path)):
        entries = rows(path)
        for row in entries:
            own = {*row.bundles}
            for seals, whole, intervals in forecasts:
                if own and (own == {*seals} if whole else own <= {*seals}):
                    row.forecast, found = intervals, found + 1
                    break
        if found:
            _write(path, entries)
    return found


def _score(text: object, previous: float | None) -> float | None:
    """Kaggle's score, which is a text; `previous` if it is empty."""
    try:
        return float(str(text)) if text not in (None, "") else previous
    except ValueError:
        return previous


def refresh(path: Path, *, clock: WaitClock | None = None) -> None:
    """Ask Kaggle for missing scores; private ones appear when a competition ends.

    Raises:
        PackagingError: no credentials, or Kaggle refused.
    """
    missing: dict[str, set[int]] = defaultdict(set)
    entries = rows(path)
    if not entries:
        console.print(f"no submission yet in {path}")
        return
    for row in entries:
        if row.status != "ERROR" and (row.public is None or row.private is None):
            missing[row.competition].add(row.submission)
    if not missing:
        console.print("the ledger has every score")
        return
    kaggle = KaggleClient(clock or WaitClock())
    for competition, numbers in missing.items():
        answers = {answer["ref"]: answer for answer in kaggle.submissions(competition)}
        for submission in sorted(numbers & set(answers)):
            update(path, submission, answers[submission])
        if lost := sorted(numbers - set(answers)):
            console.print(f"note: {competition} lists no submission {', '.join(map(str, lost))}")


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _write(path: Path, entries: Sequence[LedgerRow]) -> None:
    write_text(path, "".join(f"{row.model_dump_json()}\n" for row in entries))


# --- for people ------------------------------------------------------------------------------------------------------


def render(path: Path) -> Group:
    """The table of submissions, newest last, and how well out-of-fold and leaderboard scores agree."""
    entries = rows(path)
    if not entries:
        return Group(f"no submission yet in {path}")
    columns = ("when, config", "folds", "out of fold", "public", "private", "h:mm", "bundles, message")
    summary = table(f"Submissions of {path}", *columns)
    summary.padding = (0, 1, 0, 0)
    summary.columns[-1].justify = "left"
    best = _best(entries)
    for row in entries:
        public = row.status.lower() if row.public is None and row.status != "COMPLETE" else number(row.public, 5)
        first = f"{row.when[:16].replace('T', ' ')}\n{row.config}"
        more = f" +{len(row.bundles) - 1}" if len(row.bundles) > 1 else ""
        last = f"{row.bundles[0][:8] if row.bundles else '-'}{more}\n{row.message}"
        scores = number(row.out_of_fold, 5), public, number(row.private, 5)
        folds = row.folds.values()
        spread = f"{min(folds):.2f}-{max(folds):.2f} ({len(folds)})" if folds else "-"
        duration = "-" if row.seconds is None else str(timedelta(minutes=round(row.seconds / 60)))[:-3]
        cells = (Text(first), spread, *scores, duration, Text(last))
        summary.add_row(*cells, style="bold" if row in best else None)
    directions = (f"{name} counts {_direction(metric)}" for name, metric in _metrics(entries))
    summary.caption, summary.caption_justify = "; ".join(directions), "left"
    return Group(summary, *_nested(entries), *_forecasts(entries), _agreement(entries))


def _nested(entries: Sequence[LedgerRow]) -> list[Table]:
    """What the calibrations and blends gain on rows that they were not fitted to; nothing if none is known."""
    known = [(row, row.nested) for row in entries if row.nested is not None]
    gains = table("Calibrations and blends: log loss", "when, config", "method", "raw", "nested", "gain", "own rows")
    for row, found in known:
        bounds = "" if found.low is None or found.high is None else f"\n{found.low:.4f} to {found.high:.4f}"
        gains.add_row(
            Text(f"{row.when[:16].replace('T', ' ')}\n{row.config}"),
            found.method + "\n(not applied)" * (not found.applied),
            number(found.raw, 5),
            number(found.nested, 5),
            f"{found.gain:+.5f}{bounds}",
            number(found.flattering, 5),
        )
    gains.caption, gains.caption_justify = "nested: each row by a fit to other folds; own rows: flatters", "left"
    return [gains] if known else []


def _forecasts(entries: Sequence[LedgerRow]) -> list[Table]:
    """Scores beside their intervals, and how many lie in them; nothing if none was forecast."""
    known = [(row, row.forecast) for row in entries if row.forecast is not None]
    shown, held = table("Forecasts", "when, config", "public", "expected", "private", "expected"), []
    for row, forecast in known:
        cells: list[Text] = []
        for score, (low, high) in ((row.public, forecast.public), (row.private, forecast.private)):
            inside = None if score is None else low <= score <= high
            held += [] if inside is None else [inside]
            cells += [Text(number(score, 5), "bold red" if inside is False else ""), Text(f"{low:.4f} to {high:.4f}")]
        shown.add_row(Text(f"{row.when[:16].replace('T', ' ')}\n{row.config}"), *cells)
    levels = dict.fromkeys(f"{forecast.level:.0%}" for _, forecast in known)
    shown.caption = f"{sum(held)} of {len(held)} real scores lay in their {', '.join(levels)} interval"
    shown.caption_justify = "left"
    return [shown] if known else []


def _metrics(entries: Sequence[LedgerRow]) -> list[tuple[str, str]]:
    """`(competition, metric)` of the submissions, in the order of the ledger."""
    return list(dict.fromkeys((row.competition, row.metric) for row in entries))


def _direction(metric: str) -> str:
    record = METRICS.get(metric)
    return metric if record is None else f"{record.title} ({record.direction})"


def _best(entries: Sequence[LedgerRow]) -> list[LedgerRow]:
    """The submission with the best public score of each competition and metric."""
    best: dict[tuple[str, str], LedgerRow] = {}
    for row in entries:
        if row.metric in METRICS and row.public is not None:
            before = best.setdefault((row.competition, row.metric), row).public
            if before is not None and METRICS[row.metric].is_better(row.public, before):
                best[row.competition, row.metric] = row
    return list(best.values())


def _agreement(entries: Sequence[LedgerRow]) -> Table:
    """Correlation and mean gap of out-of-fold and leaderboard, for each competition's public and private one."""
    summary = table("Out of fold and leaderboard", "leaderboard", "runs", "Pearson", "Spearman", "mean gap")
    for board, _, pairs in _boards(entries):
        gap = f"{np.mean(pairs[:, 1] - pairs[:, 0]):+.5f}" if len(pairs) else "-"
        summary.add_row(board, str(len(pairs)), *_correlations(pairs), gap)
    return summary


def _boards(entries: Sequence[LedgerRow]) -> Iterator[tuple[str, list[LedgerRow], Floats]]:
    """For each competition's public and private leaderboard: its title, the runs with both scores, and these (n, 2)."""
    for competition in dict.fromkeys(row.competition for row in entries):
        for name in ("public", "private"):
            scores = [(row, row.out_of_fold, getattr(row, name)) for row in entries if row.competition == competition]
            both = [entry for entry in scores if None not in entry]
            pairs = np.array([entry[1:] for entry in both], dtype=np.float64).reshape(-1, 2)
            yield f"{competition}, {name}", [row for row, *_ in both], pairs


def _correlations(pairs: Floats) -> tuple[str, str]:
    """Pearson's correlation of the values and Spearman's of the ranks, as texts."""
    from scipy.stats import pearsonr, spearmanr

    if len(pairs) < _FEWEST:
        return "not enough", "not enough"
    if not np.ptp(pairs, axis=0).all():
        return "all equal", "all equal"
    oof, board = pairs.T
    return f"{pearsonr(oof, board).statistic:.3f}", f"{spearmanr(oof, board).statistic:.3f}"


NOTHING_TO_PLOT = "no submission has both an out-of-fold and a leaderboard score yet"


def write_page(path: Path, out: Path) -> int:
    """Write a page with the leaderboard's scores over the out-of-fold ones, public and private; it needs no network.

    Returns the number of points.
    """
    entries = rows(path)
    boards, pairs = [], np.empty((0, 2))
    for board, runs, scores in _boards(entries):
        texts = [f"{row.config}: {row.message}" for row in runs]
        out_of_fold, leaderboard = scores.T.tolist()
        boards.append(Series(board, out_of_fold, leaderboard, texts, style="points"))
        pairs = np.concatenate([pairs, scores])
    metrics = ", ".join(dict.fromkeys(_direction(metric) for _, metric in _metrics(entries)))
    scatter = plot(
        "Leaderboard over out of fold",
        [*_equal(pairs), *boards],
        x=f"out of fold: {metrics}" if metrics else "out of fold",
        y="leaderboard",
        empty=NOTHING_TO_PLOT,
    )
    agreement = [printed(_agreement(entries))] if entries else []
    write_text(out, document("Out of fold and leaderboard", [scatter, *agreement]))
    return len(pairs)


def _equal(pairs: Floats) -> list[Series]:
    """Where both scores are equal, as far as the axes reach: in a range for both, the points would lie in a corner."""
    if len(pairs):
        low, high = float(pairs.min(axis=0).max()), float(pairs.max(axis=0).min())
        if low < high:
            return [Series("equal", [low, high], [low, high], style="reference")]
    return []
