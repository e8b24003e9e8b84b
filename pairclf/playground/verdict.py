"""Verdicts on a row that is typed or loaded: a request's JSON in, what the page shows out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl

from pairclf.api.judge import Judge
from pairclf.console import silenced
from pairclf.data.answers import ANSWERS
from pairclf.data.formats import TURNS
from pairclf.errors import DataError
from pairclf.inference.rank import ensemble_of_contest
from pairclf.inference.resident import encode_rows
from pairclf.inputs.render import Encoded
from pairclf.inspect.show import find_rows
from pairclf.run import chunks_of
from pairclf.task import AB, REWARD, SIDE

Json: TypeAlias = dict[str, Any]
"""An object of JSON."""

Turns: TypeAlias = list[str | None]
"""The turns of a text, as JSON has them."""


class Playground:
    """A judge, and a file whose rows can be loaded. Not thread-safe, as a judge is not.

    Args:
        judge: its models load at the first verdict.
        data: a file in the form of the task's test files; None: no row can be loaded.
    """

    def __init__(self, judge: Judge, data: Path | None = None) -> None:
        self._judge = judge
        self._data = data
        self._sides = list(judge.task.swap_fields or ())
        self._shared = [name for name in judge.task.fields if name not in self._sides]

    @property
    def form(self) -> Json:
        """What the page asks for: the fields of a row, and the classes."""
        task = self._judge.task
        return {
            "task": task.name,
            "fields": self._shared,
            "sides": self._sides,
            "classes": list(task.classes),
            "turns": task.multi_turn,
            "bundles": [member.name for member in self._judge.ensemble.members],
            "data": None if self._data is None else self._data.name,
        }

    def warm_up(self) -> None:
        """Load the models, and look for the file: errors show before the page does, and the first verdict is no slower.

        Raises:
            DataError, BundleError, ModelError: the file or a model can't be loaded.
        """
        if self._data is not None:
            self.row({"id": ""})
        word: Turns = ["x"]
        self.verdict({"fields": dict.fromkeys(self._shared, word), "answers": [word] * len(self._sides)})

    def row(self, request: Any) -> Json:
        """The row of the file with the request's `id`, or its first row for an empty one.

        Raises:
            DataError: the file can't be read, or no row has this id.
        """
        row_id = request.get("id") if isinstance(request, dict) else None
        if self._data is None or not isinstance(row_id, str):
            raise DataError("a row is loaded by its id, from a file", remedy="pairclf try BUNDLE --data FILE")
        config = self._judge.ensemble.members[0].bundle.config
        with silenced():
            ids = [_replaced(row_id)] if row_id else []
            row = find_rows(chunks_of(config, self._data)(), ids, config.task)[0]
        return {
            "id": row.id,
            "fields": {name: list(row.fields[name]) for name in self._shared},
            "answers": [list(row.fields[name]) for name in self._sides],
        }

    def verdict(self, request: Any) -> Json:
        """Probabilities of a row in both orders, or the ranking of more than two answers; and what was cut.

        Args:
            request: `fields`, the turns of each field that is no side's; `answers`, the turns of each answer.

        Returns:
            `classes`, each with its `name` and `probabilities` (the mean, then those of both orders), and `rewards` of
            both sides, if there are any; or `ranking`, the `rank` and `score` of each answer, and `score`, the name of
            that score. `cut`, the tokens that each text loses, by bundle; and `seconds`.

        Raises:
            DataError: the request is no row of the task.
            ConfigError, IncompleteError, ModelError, BundleError: as `Judge.predict` and `Judge.rank`.
        """
        start = time.perf_counter()
        fields, answers = self._typed(request)
        with silenced():
            result = self._ranked(fields, answers) if len(answers) > 2 else self._scored(fields, answers)
            cut = self._cut(fields, answers)
        return {**result, "cut": cut, "seconds": time.perf_counter() - start}

    def _typed(self, request: Any) -> tuple[dict[str, Turns], list[Turns]]:
        """The turns of the fields that are no side's, and of the answers."""
        match request:
            case {"fields": dict(fields), "answers": list(answers)} if (
                fields.keys() == {*self._shared}
                and (len(answers) >= 2 if self._sides else not answers)
                and all(map(_are_turns, [*fields.values(), *answers]))
            ):
                return {name: _mended(turns) for name, turns in fields.items()}, [_mended(turns) for turns in answers]
        sides = "at least two answers" if self._sides else "no answers"
        what = f"this is no row of task {self._judge.task.name!r}, which has the fields {self._shared} and {sides}"
        raise DataError(what, remedy="load the page anew")

    def _scored(self, fields: dict[str, Turns], answers: Sequence[Turns]) -> Json:
        orders = self._judge.ensemble.orders > 1
        row = self._columns(fields | dict(zip(self._sides, answers, strict=True)))
        rewards = self._judge.is_rewarding
        scores = self._judge.predict(row, orders=orders, rewards=rewards).row(0, named=True)
        endings = ["", "_AB", "_BA"] if orders else [""]
        classes = [
            {"name": name, "probabilities": [scores[name + ending] for ending in endings]}
            for name in self._judge.classes
        ]
        return {"classes": classes, "rewards": [scores[f"{REWARD}_{name}"] for name in self._sides if rewards]}

    def _ranked(self, fields: dict[str, Turns], answers: Sequence[Turns]) -> Json:
        if any(len(turns) != 1 for turns in answers):
            raise DataError(
                "more than two answers are compared, and one of them has several turns",
                remedy="give two answers, or answers of one turn each",
            )
        texts = pl.Series([[turns[0] or "" for turns in answers]], dtype=TURNS)
        table = self._judge.rank({**self._columns(fields), ANSWERS: texts})
        score = table.columns[2]
        return {"score": score, "ranking": [{"rank": row["rank"], "score": row[score]} for row in table.to_dicts()]}

    def _columns(self, row: Mapping[str, Turns]) -> dict[str, pl.Series]:
        """One row, under the names of test files."""
        names = self._judge.ensemble.data.test.columns
        return {names.get(name) or name: pl.Series([turns], dtype=TURNS) for name, turns in row.items()}

    def _cut(self, fields: dict[str, Turns], answers: Sequence[Turns]) -> list[Json]:
        """The tokens that each text loses, by bundle: the most of all pairs of answers. Whole texts are left out."""
        ensemble = ensemble_of_contest(self._judge.ensemble) if len(answers) > 2 else self._judge.ensemble
        pointwise = bool(self._sides) and not ensemble.task.swappable
        places = [SIDE] if pointwise else self._sides
        chosen = list(combinations(range(len(answers)), len(places)))
        rows = [fields | dict(zip(places, (answers[at] for at in numbers), strict=True)) for numbers in chosen]
        frame = pl.DataFrame(rows, dict.fromkeys(ensemble.task.fields, TURNS))
        found = dict[tuple[str, str | int], int]()
        for member in ensemble.members:
            for numbers, orders in zip(chosen, encode_rows(member.bundle, frame, {}), strict=True):
                dropped = orders[AB].dropped if isinstance(orders[AB], Encoded) else {}
                for place, tokens in dropped.items():
                    key = member.name, numbers[places.index(place)] if place in places else place
                    found[key] = max(tokens, found.get(key, 0))
        return [
            {"bundle": bundle, "text": text, "tokens": tokens} for (bundle, text), tokens in found.items() if tokens
        ]


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(turn is None or isinstance(turn, str) for turn in turns)


def _mended(turns: Turns) -> Turns:
    return [turn and _replaced(turn) for turn in turns]


def _replaced(text: str) -> str:
    """Unpaired surrogates, which UTF-8 can't hold, as U+FFFD, which they become in files too."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
