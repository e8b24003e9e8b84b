"""The ledger: a line for each submission, and how far the out-of-fold score foretells the leaderboard's.

`runs/ledger.jsonl` opens with `polars.read_ndjson`. It is only ever written whole, under a lock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pairclf.config import Section, checked
from pairclf.console import console, table
from pairclf.errors import PackagingError
from pairclf.files import atomic_file, check_file_target, locked, parsed, write_text
from pairclf.publish.client import Clock, Kaggle

_FEWEST = 3  # runs; of two, any correlation is 1


class Row(Section):
    """One submission."""

    when: str = Field(description="UTC, when it was made")
    build: str = Field(description="the build's identity")
    config: str = Field(description="name of the run")
    competition: str = Field(description="its slug")
    metric: str = Field(description="what folds and out_of_fold are, and the leaderboard counts: log_loss or accuracy")
    folds: dict[str, float] = Field(description="of each bundle on the rows of its fold")
    out_of_fold: float | None = Field(None, description="over all folds' rows")
    public: float | None = Field(None, description="score on the public leaderboard")
    private: float | None = Field(None, description="on the private one, which Kaggle shows when the competition ends")
    status: str = Field("PENDING", description="Kaggle's word: PENDING, COMPLETE or ERROR")
    error: str = Field("", description="what Kaggle says of a submission that was not scored")
    seconds: float | None = Field(None, description="of the notebook's run on Kaggle, or else of its rehearsal")
    bundles: list[str] = Field(description="seals of the bundles, SHA-256 in hex")
    message: str = Field(description="as it was submitted")
    kernel: str = Field(description="owner/slug/version")
    submission: int = Field(description="Kaggle's number for it")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def rows(path: Path) -> list[Row]:
    """All submissions, in the order in which they were made; none where there is no file.

    Raises:
        PackagingError: a line is no JSON.
        ConfigError: a line is no submission.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            found.append(_row(line, f"{path}, line {number}"))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PackagingError(f"{path} is no text: {error}", remedy="put an older copy in its place") from error


def _row(line: str, where: str) -> Row:
    try:
        tree = parsed(line)
    except ValueError as error:
        raise PackagingError(
            f"a line of the ledger is no JSON: {error}", where=where, remedy="mend or remove it"
        ) from error
    if foreign := sorted(set(tree) - set(Row.model_fields)) if isinstance(tree, dict) else []:
        raise PackagingError(
            f"a line of the ledger has {', '.join(foreign)}, which no submission has",
            where=where,
            remedy="remove it; or read the ledger with the pairclf that wrote it",
        )
    return checked(Row, tree, where, "mend or remove the line")


def prepare(path: Path) -> None:
    """See that the ledger can be read and written, before anything happens that is to be written there.

    Raises:
        PackagingError, ConfigError: see `rows`.
        PairclfError, OSError: no file can be written there.
    """
    check_file_target(path)
    with locked(_lock(path)):
        _write(path, rows(path))


def record(path: Path, row: Row) -> None:
    """Add a submission, unless its number is there."""
    with locked(_lock(path)):
        found = rows(path)
        if row.submission not in [one.submission for one in found]:
            _write(path, [*found, row])


def update(path: Path, submission: int, answer: Mapping[str, Any]) -> None:
    """Write what Kaggle says of a submission into its line.

    Args:
        path: the ledger.
        submission: its number; one that is not in the ledger is passed over.
        answer: `status`, `publicScore`, `privateScore`, `errorDescription`, as the client gives them.
    """
    with locked(_lock(path)):
        found = rows(path)
        for row in found:
            if row.submission == submission:
                row.status = str(answer["status"])
                row.error = str(answer.get("errorDescription") or "")
                row.public = _score(answer.get("publicScore"), row.public)
                row.private = _score(answer.get("privateScore"), row.private)
        _write(path, found)


def _score(text: object, known: float | None) -> float | None:
    """Kaggle gives scores as text, and none as an empty one."""
    try:
        return float(str(text)) if text not in (None, "") else known
    except ValueError:
        return known


def refresh(path: Path, *, clock: Clock | None = None) -> None:
    """Ask Kaggle for the scores that are missing: a private one appears when its competition ends.

    Raises:
        PackagingError: no credentials, or Kaggle refused.
    """
    missing: dict[str, set[int]] = defaultdict(set)
    found = rows(path)
    if not found:
        console.print(f"no submission yet in {path}")
        return
    for row in found:
        if row.status != "ERROR" and (row.public is None or row.private is None):
            missing[row.competition].add(row.submission)
    if not missing:
        console.print("the ledger has every score")
        return
    kaggle = Kaggle(clock or Clock())
    for competition, wanted in missing.items():
        answers = {one["ref"]: one for one in kaggle.submissions(competition)}
        for submission in sorted(wanted & set(answers)):
            update(path, submission, answers[submission])
        if lost := sorted(wanted - set(answers)):
            console.print(f"note: {competition} lists no submission {', '.join(map(str, lost))}")


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _write(path: Path, found: Sequence[Row]) -> None:
    write_text(path, "".join(f"{row.model_dump_json()}\n" for row in found))


# --- for people ------------------------------------------------------------------------------------------------------


def render(path: Path) -> Group:
    """The table, newest last, and below it how out-of-fold and leaderboard go together."""
    found = rows(path)
    if not found:
        return Group(f"no submission yet in {path}")
    columns = ("when, config", "folds", "out of fold", "public", "private", "h:mm", "bundles, message")
    made = table(f"Submissions of {path}", *columns)
    made.padding = (0, 1, 0, 0)
    made.columns[-1].justify = "left"
    for row in found:
        public = row.status.lower() if row.public is None and row.status != "COMPLETE" else _number(row.public)
        first = f"{row.when[:16].replace('T', ' ')}\n{row.config}"
        more = f" +{len(row.bundles) - 1}" if len(row.bundles) > 1 else ""
        last = f"{row.bundles[0][:8] if row.bundles else '-'}{more}\n{row.message}"
        scores = _number(row.out_of_fold), public, _number(row.private)
        made.add_row(Text(first), _range(list(row.folds.values())), *scores, _time(row.seconds), Text(last))
    return Group(made, _agreement(found))


def _range(losses: Sequence[float]) -> str:
    return f"{min(losses):.2f}-{max(losses):.2f} ({len(losses)})" if losses else "-"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _agreement(found: Sequence[Row]) -> Table:
    """Correlation and mean gap of out-of-fold and leaderboard, for each competition's public and private one."""
    made = table("Out of fold and leaderboard", "leaderboard", "runs", "Pearson", "Spearman", "mean gap")
    for (competition, name), some in _boards(found):
        pairs = _pairs(some, name)
        gap = f"{np.mean(pairs[:, 1] - pairs[:, 0]):+.5f}" if len(pairs) else "-"
        made.add_row(f"{competition}, {name}", str(len(pairs)), *_correlations(pairs), gap)
    return made


def _boards(found: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """`(competition, public or private)` and its submissions: what one counts is not what another does."""
    for competition in dict.fromkeys(row.competition for row in found):
        for name in ("public", "private"):
            yield (competition, name), [row for row in found if row.competition == competition]


def _pairs(found: Sequence[Row], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`(n, 2)`: out-of-fold score and leaderboard's, of the runs that have both."""
    both = [(row.out_of_fold, getattr(row, name)) for row in found]
    return np.array([pair for pair in both if None not in pair], dtype=np.float64).reshape(-1, 2)


def _correlations(pairs: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[str, str]:
    """Pearson's of the values and Spearman's of the ranks, as text."""
    from scipy.stats import pearsonr, spearmanr

    if len(pairs) < _FEWEST:
        return "not enough", "not enough"
    if not np.ptp(pairs, axis=0).all():
        return "all equal", "all equal"
    oof, board = pairs.T
    return f"{pearsonr(oof, board).statistic:.3f}", f"{spearmanr(oof, board).statistic:.3f}"


def plot(path: Path, out: Path) -> None:
    """Write a page with the leaderboard's scores over the out-of-fold ones, public and private; it needs no network."""
    from plotly.graph_objects import Figure

    found = rows(path)
    figure = Figure()
    for (competition, name), some in _boards(found):
        shown = [row for row in some if row.out_of_fold is not None and getattr(row, name) is not None]
        figure.add_scatter(
            x=[row.out_of_fold for row in shown],
            y=[getattr(row, name) for row in shown],
            text=[f"{row.config}: {row.message}" for row in shown],
            mode="markers",
            name=f"{competition}, {name}",
        )
    both = np.concatenate([_pairs(found, name) for name in ("public", "private")])
    if len(both):
        ends = [float(both.min()), float(both.max())]
        figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"dash": "dot", "width": 1})
        # Each axis shows its own scores: in a range that held both, the points would lie in a corner.
        for axis, values in zip((figure.update_xaxes, figure.update_yaxes), both.T, strict=True):
            room = 0.05 * float(np.ptp(values)) or 0.01
            axis(range=[float(values.min()) - room, float(values.max()) + room])
    else:
        note = {"text": "no submission has both scores yet", "showarrow": False, "font": {"size": 18}}
        figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", **note)
    figure.update_xaxes(title_text=f"out of fold ({', '.join(sorted({row.metric for row in found})) or 'no run yet'})")
    figure.update_yaxes(title_text="leaderboard")
    figure.update_layout(template="plotly_white", height=650, title="Out of fold and leaderboard")
    with atomic_file(out) as temporary:
        temporary.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
