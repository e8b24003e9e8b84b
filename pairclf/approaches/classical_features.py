"""The dense features of the classical approach: what a text looks like, and how two texts compare.

Each is a number of one row's texts alone. Counts are logarithms of 1 + n, so that a difference of two is a ratio.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task, Turns


@dataclass(frozen=True)
class MeasuredText:
    """A field's turns, and what several features read of them."""

    turns: Turns

    @cached_property
    def text(self) -> str:
        return "\n".join(turn or "" for turn in self.turns)

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    @cached_property
    def characters(self) -> Counter[str]:
        return Counter(self.text)

    @cached_property
    def words(self) -> list[str]:
        return _WORD.findall(self.text.lower())

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        return frozenset(self.words)

    @cached_property
    def trigrams(self) -> frozenset[tuple[str, ...]]:
        return frozenset(zip(self.words, self.words[1:], self.words[2:], strict=False))

    @cached_property
    def measures(self) -> list[float]:
        """The features of `MEASURES`, in this order."""
        return [measure(self) for measure in MEASURES.values()]


_WORD = re.compile(r"\w+")


def _count(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> Callable[[MeasuredText], float]:
    search = re.compile(pattern, flags)
    return lambda measured: math.log1p(sum(1 for _ in search.finditer(measured.text)))


def _words(words: str) -> Callable[[MeasuredText], float]:
    wanted = frozenset(words.split())
    return lambda measured: math.log1p(sum(word in wanted for word in measured.words))


def _characters(test: Callable[[str], bool]) -> Callable[[MeasuredText], float]:
    """The share of the characters for which the test holds."""
    return lambda of: _share(sum(n for character, n in of.characters.items() if test(character)), len(of.text))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


MEASURES: dict[str, Callable[[MeasuredText], float]] = {
    "characters": lambda of: math.log1p(len(of.text)),
    "words": lambda of: math.log1p(len(of.words)),
    "turns": lambda of: math.log1p(len(of.turns)),
    "lines": lambda of: math.log1p(of.text.count("\n")),
    "paragraphs": _count(r"\n\s*\n"),
    "empty turns": lambda of: math.log1p(sum(not (turn or "").strip() for turn in of.turns)),
    "characters of the last turn": lambda of: math.log1p(len((of.turns[-1] if of.turns else "") or "")),
    "characters of the shortest turn": lambda of: math.log1p(min((len(turn or "") for turn in of.turns), default=0)),
    "characters a word": lambda of: math.log1p(_share(len(of.text), len(of.words))),
    "characters a line": lambda of: math.log1p(_share(len(of.text), len(of.lines))),
    "different words": lambda of: _share(len(of.vocabulary), len(of.words)),
    "repeated trigrams": lambda of: _share(len(of.trigrams), len(of.words) - 2),
    "repeated lines": lambda of: _share(len(set(of.lines)), len(of.lines)),
    "compressed": lambda of: min(1.0, _share(len(zlib.compress(of.text.encode("utf-8", "replace"), 1)), len(of.text))),
    "sentences": _count(r"[.!?。！？](?=\s|$)"),
    "commas": _count(r"[,;，、]"),
    "colons": _count(r":(?=\s)"),
    "questions": _count(r"[?？]"),
    "exclamations": _count(r"[!！]"),
    "bullets": _count(r"^\s*[-*•+]\s", re.MULTILINE),
    "numbered items": _count(r"^\s*\d+[.)]\s", re.MULTILINE),
    "headings": _count(r"^#{1,6}\s", re.MULTILINE),
    "table rows": _count(r"^\s*\|.*\|", re.MULTILINE),
    "bold": _count(r"\*\*[^*\n]+\*\*"),
    "code blocks": _count(r"```"),
    "inline code": _count(r"(?<!`)`[^`\n]+`(?!`)"),
    "formulas": _count(r"\\\w+|\$"),
    "links": _count(r"https?://|\]\("),
    "numbers": _count(r"\d+"),
    "quotations": _count(r"[\"“”«»]"),
    "parentheses": _count(r"\("),
    "emoji": _count(r"[\u2600-\u27bf\U0001f300-\U0001faff]"),
    "capitals": _characters(str.isupper),
    "digits": _characters(str.isdigit),
    "white space": _characters(str.isspace),
    "Asian characters": _characters(lambda character: character >= "\u3000"),
    "bytes a character": lambda of: _share(len(of.text.encode("utf-8", "replace")), len(of.text)),
    "first person": _words("i me my mine we our us"),
    "second person": _words("you your yours"),
    "refusals": _words("sorry unable cannot apologize apologise ai inappropriate unfortunately"),
    "hedges": _words("may might could perhaps possibly likely seem seems generally usually however depends note"),
    "offers": _words("certainly sure absolutely here hope glad happy feel help"),
    "conclusions": _words("conclusion summary overall therefore finally ultimately"),
    # habits of a model, by which its answers are known
    "leading white space": lambda of: math.log1p(sum(len(turn) - len(turn.lstrip()) for turn in of.turns if turn)),
    "trailing white space": lambda of: math.log1p(sum(len(turn) - len(turn.rstrip()) for turn in of.turns if turn)),
    "double spaces": lambda of: math.log1p(of.text.count("  ")),
    "begins with a heading": lambda of: float(of.text.lstrip()[:1] == "#"),
    "begins with a quotation": lambda of: float(of.text.lstrip()[:1] in {*"\"'“«"}),
    "ends": lambda of: float(of.text.rstrip()[-1:] in {*".!?。！？)`\"'”|:*"}),
}
"""Features of one text by name."""

COMPARISONS = 8


def _common_start(first: str, second: str) -> int:
    """Characters at the start that two texts have in common."""
    shorter = min(len(first), len(second))
    different = (place for place in range(shorter) if first[place] != second[place])
    return next(different, shorter)


def comparison(first: MeasuredText, second: MeasuredText) -> list[float]:
    """Shares of common words and trigrams, parts of each text's words, ratio of lengths, equality, common beginning.

    Exchanging the texts exchanges the numbers 2 and 3, the parts, and leaves the others as they are.
    """
    words = len(first.vocabulary & second.vocabulary)
    trigrams = len(first.trigrams & second.trigrams)
    beginning = _common_start(first.text, second.text)
    return [
        _share(words, len(first.vocabulary | second.vocabulary)),
        _share(trigrams, len(first.trigrams | second.trigrams)),
        _share(words, len(first.vocabulary)),
        _share(words, len(second.vocabulary)),
        abs(math.log1p(len(first.text)) - math.log1p(len(second.text))),
        float(first.text == second.text),
        math.log1p(beginning),
        _share(beginning, min(len(first.text), len(second.text))),
    ]


@dataclass(frozen=True, slots=True)
class DenseFeatures:
    """Of rows: `measures` of each field `(N, M)`, and `comparisons` of two fields `(N, K)`."""

    measures: Mapping[str, Floats]
    comparisons: Mapping[tuple[str, str], Floats]

    def __getitem__(self, rows: Any) -> DenseFeatures:
        """Those of some rows."""
        return DenseFeatures(
            {name: values[rows] for name, values in self.measures.items()},
            {names: values[rows] for names, values in self.comparisons.items()},
        )

    @classmethod
    def concat(cls, parts: Sequence[DenseFeatures]) -> DenseFeatures:
        """Rows of several parts, one after the other."""
        return cls(
            {name: np.concatenate([part.measures[name] for part in parts]) for name in parts[0].measures},
            {names: np.concatenate([part.comparisons[names] for part in parts]) for names in parts[0].comparisons},
        )

    def oriented(self, first: str, second: str) -> Floats:
        """The comparison of two fields `(N, K)`, as it is if `first` is the first of them."""
        if (first, second) in self.comparisons:
            return self.comparisons[first, second]
        values = self.comparisons[second, first]
        columns = np.arange(values.shape[1])
        columns[2:4] = columns[2:4][::-1]  # the parts of each text's words; without dense features there are no columns
        return values[:, columns]


def dense_features(rows: Sequence[Row], task: Task, *, empty: bool = False) -> DenseFeatures:
    """Compute all dense features of `rows`; `empty` ones have no columns."""
    if empty:
        none = np.zeros((len(rows), 0))
        return DenseFeatures(dict.fromkeys(task.fields, none), dict.fromkeys(pairs_of(task), none))
    measures: dict[str, list[list[float]]] = {name: [] for name in task.fields}
    comparisons: dict[tuple[str, str], list[list[float]]] = {names: [] for names in pairs_of(task)}
    for row in rows:
        texts = {name: MeasuredText(row.fields[name]) for name in task.fields}
        for name, text in texts.items():
            measures[name].append(text.measures)
        for first, second in comparisons:
            comparisons[first, second].append(comparison(texts[first], texts[second]))
    return DenseFeatures(
        {name: _table(values, len(MEASURES)) for name, values in measures.items()},
        {names: _table(values, COMPARISONS) for names, values in comparisons.items()},
    )


def pairs_of(task: Task) -> list[tuple[str, str]]:
    """Fields that are compared: the two sides, and each other field with each side; none where there are no sides."""
    if task.swap_fields is None:
        return []
    return [(task.swap_fields[0], task.swap_fields[1])] + [
        (name, side) for name in task.fields if name not in task.swap_fields for side in task.swap_fields
    ]


def _table(values: list[list[float]], columns: int) -> Floats:
    return np.array(values, dtype=np.float64).reshape(len(values), columns)
