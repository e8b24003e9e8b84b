"""Rows as HTML: texts, probabilities and labels of each, and the form that filters them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pairclf.console import counted
from pairclf.errors import cut
from pairclf.page.html import Html, element, join
from pairclf.reports.contents import Contents
from pairclf.reports.rows import KINDS, Piece, ShownRow
from pairclf.scores.metrics import likeliest
from pairclf.task import Task

ROW_BYTES = 4_500_000
"""Most bytes of all rows in the page. With plots and tables, and whatever the texts are, it stays below 6 MB."""

LIMITS = (8_000, 4_000, 2_000, 1_000, 500, 250)
"""Characters of a field that are shown: the most with which the rows are not larger than `ROW_BYTES`."""

MOST_SHARES = 5
"""Classes whose probability a row shows, besides those of its label."""


def rows_section(contents: Contents, rows: Sequence[ShownRow], why_whole: str) -> Iterator[Html]:
    task = contents.config.task
    articles, limit = fitting(rows, task)
    sources = list(dict.fromkeys(row.source for row in rows))
    yield element("p", join(_remarks(contents, rows, len(articles), limit, why_whole)))
    if not why_whole:
        wording = contents.config.inputs.template
        text = element("pre", f"{wording.instruction or ''}{wording.text}")
        yield element("details", element("summary", "The wording around the fields"), text)
    yield _filter(rows, sources, task)
    yield join(articles)


def _remarks(
    contents: Contents, rows: Sequence[ShownRow], count: int, limit: int, why_whole: str
) -> Iterator[Html | str]:
    kinds = Counter(kind for row in rows[:count] for kind in row.kinds)
    words = ", ".join(f"{KINDS[kind]} ({count:,})" for kind, count in kinds.items())
    yield f"{counted(count, 'row')} of {contents.evaluation.rows:,}: {words}. "
    if count < len(rows):
        yield f"{counted(len(rows) - count, 'more row is', 'more rows are')} left out, as the file would be too large. "
    if why_whole:
        yield f"Texts are whole: {why_whole}. "
    else:
        yield "Texts are in the words of the model's tokens; what truncation cut folds out. "
    if contents.evaluation.orders is not None:
        yield "Order BA shows the same pieces of text with the sides exchanged. "
    if examples := contents.config.num_examples:
        yield f"{counted(examples, 'example')} stood before each row. "
    yield f"Of longer fields about {limit:,} characters are in this file. Keys: "
    keys = {"j": "next", "k": "previous", "x": "tick", "c": "copy the id", "/": "search"}
    yield join(
        part
        for place, (key, word) in enumerate(keys.items(), 1)
        for part in (element("kbd", key), f" {word}{', ' if place < len(keys) else '.'}")
    )


def _filter(rows: Sequence[ShownRow], sources: Sequence[str], task: Task) -> Html:
    labels = sorted({place for row in rows for place in label_places(row, task)})
    options = {
        "kinds": ("kind", {name: words for name, words in KINDS.items() if any(name in row.kinds for row in rows)}),
        "labels": ("label", {str(place): task.classes[place] for place in labels}),
        "source": ("source", {str(place): short_source(name, sources) for place, name in enumerate(sources)}),
    }
    selects = (
        element(
            "label", f"{title} ",
            element("select", element("option", "all", value=""),
                    *(element("option", words, value=value) for value, words in values.items()), name=name),
        )
        for name, (title, values) in options.items()
        if len(values) > 1
    )  # fmt: skip
    buttons = {"tick": "tick those shown", "untick": "untick all", "text": "ids as .txt", "csv": "ids as .csv"}
    return element(
        "form",
        *selects,
        element("label", "search ", element("input", type="search", name="search")),
        element("label", element("input", type="checkbox", name="ticked"), " only ticked"),
        *(element("button", words, type="button", data_action=name) for name, words in buttons.items()),
        element("output", counted(len(rows), "row"), id="count", aria_live="polite"),
        id="filter",
    )


def short_source(name: str, sources: Sequence[str]) -> str:
    """A file's name without its folder, unless another one has it too."""
    last = Path(name).name
    return last if sum(Path(other).name == last for other in sources) == 1 else name


def label_places(row: ShownRow, task: Task) -> list[int]:
    """The classes of a row's label: its likeliest, or, of several labels, those with one half or more."""
    target = np.array([row.scores[f"target_{name}"] for name in task.classes])
    return np.flatnonzero(target >= 0.5).tolist() if task.multi_label else likeliest(target[None]).tolist()


def fitting(rows: Sequence[ShownRow], task: Task, most: int = ROW_BYTES) -> tuple[list[Html], int]:
    """The rows as HTML, and the characters of a field that are shown: the most with which the rows are not too large.

    Where they are too large even so (ids may be long as well), the last rows are left out.
    """
    sources = list(dict.fromkeys(row.source for row in rows))
    for limit in LIMITS:
        articles = [_article(row, place, task, sources, limit) for place, row in enumerate(rows)]
        sizes = np.cumsum([len(article.encode()) for article in articles])
        if not len(sizes) or sizes[-1] <= most:
            return articles, limit
    return articles[: int((sizes <= most).sum())], limit


def _article(row: ShownRow, place: int, task: Task, sources: Sequence[str], limit: int) -> Html:
    labels = label_places(row, task)
    head = [
        element("input", type="checkbox", aria_label=f"tick {cut(row.row.id)}"),
        element("h3", cut(row.row.id)),
        element("button", "copy id", type="button"),
        element("span", "label ", element("strong", ", ".join(task.classes[place] for place in labels) or "none")),
        element("span", f"log loss {row.scores['loss']:.3f}"),
        None if row.suspicion is None else element("span", f"P(label is wrong) {row.suspicion:.2f}"),
        None if row.fold is None else element("span", f"fold {row.fold}"),
        element("span", ", ".join(KINDS[kind] for kind in row.kinds), class_="quiet"),
        element("span", short_source(row.source, sources), class_="quiet") if len(sources) > 1 else None,
    ]
    reasons = element("ul", *(element("li", cut(reason)) for reason in row.reasons)) if row.reasons else None
    return element(
        "article", element("div", *head, class_="head"), _shares(row, task, labels), reasons, _texts(row, task, limit),
        class_="row", tabindex=-1, data_row=place, data_kinds=" ".join(row.kinds),
        data_labels=" ".join(map(str, labels)), data_source=sources.index(row.source),
    )  # fmt: skip


def _shares(row: ShownRow, task: Task, labels: Sequence[int]) -> Html:
    """A line a class: whether it is the label, and its probability in each order as a bar."""
    columns = {"mean": "p"}
    if f"p_ab_{task.classes[0]}" in row.scores:
        columns |= {"order AB": "p_ab", "order BA": "p_ba"}
    predicted = [row.scores[f"p_{name}"] for name in task.classes]
    likely = sorted(range(len(predicted)), key=lambda place: -predicted[place])[:MOST_SHARES]
    lines = []
    for place in sorted({*likely, *labels}):
        name = task.classes[place]
        target = row.scores[f"target_{name}"]
        words = f"{name} (label)" if target == 1 else f"{name} (label {target:.2f})" if target > 0 else name
        cells = [element("td", _bar(row.scores[f"{prefix}_{name}"])) for prefix in columns.values()]
        lines.append(element("tr", element("th", words, scope="row"), *cells, class_="label" if target else None))
    head = element("tr", element("th", ""), *(element("th", title, scope="col") for title in columns))
    return element("div", element("table", element("thead", head), element("tbody", *lines)), class_="scroll shares")


def _bar(value: float) -> Html:
    rectangle = element("rect", width=round(100 * value, 1), height=10)
    box = {"viewBox": "0 0 100 10", "preserveAspectRatio": "none"}
    return join([element("svg", rectangle, class_="share", aria_hidden="true", **box), f"{value:.3f}"])


def _texts(row: ShownRow, task: Task, limit: int) -> Html:
    sides = task.swap_fields or ()
    parts = [
        element("section", element("h4", name), _text(pieces, row.row.fields[name], limit),
                class_="side" if name in sides else "shared")
        for name, pieces in row.texts.items()
    ]  # fmt: skip
    return element("div", *parts, class_="texts pair" if sides else "texts")


def _text(pieces: Sequence[Piece], turns: Sequence[str | None], limit: int) -> Html:
    """The pieces of a field; longer ones without their middle, so that about `limit` characters are shown."""
    if not any(piece.text for piece in pieces):
        return element("p", "null" if all(turn is None for turn in turns) else "empty", class_="quiet")
    room = max(limit // len(pieces), 40)
    shown: list[object] = []
    for piece in pieces:
        if piece.turn:
            shown.append(element("strong", "\n" * bool(shown) + f"turn {piece.turn}\n", class_="quiet"))
        text = _without_middle(piece.text, room)
        if piece.cut:
            summary = element("summary", f"{counted(piece.cut, 'token')} cut: the model did not see this")
            shown.append(element("details", summary, *text))
        else:
            shown.append(element("span", *text))
    return element("div", *shown, class_="text", tabindex=0)


def _without_middle(text: str, room: int) -> list[object]:
    """A text, or its head and tail with the number of characters between them."""
    if len(text) <= room:
        return [text]
    head, tail = room * 3 // 4, room // 4
    gone = element("em", f" [{len(text) - head - tail:,} characters are not in this file] ", class_="quiet")
    return [text[:head], gone, text[len(text) - tail :]]
