"""Wording and special tokens: `InputBuilder` turns a row into token ids and the spans of its segments.

The same builder, made from the same saved recipe, serves training, validation and the notebook. Every segment is
tokenised alone and spliced by ids: both orders of a row come from one tokenisation, and the prompt has the same ids
in both. The template's own text may hold the tokenizer's special tokens; the users' text never makes one: whatever
is typed inside a response stays plain text, so that nobody can close a segment or forge a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

from pairclf.config import Inputs
from pairclf.errors import ConfigError
from pairclf.inputs.truncate import Ids, Kept, allot, cut
from pairclf.task import AB, BA, Row, Task


class Tokenizer(Protocol):
    """What is asked of a tokenizer: a fast one of transformers fits."""

    bos_token_id: int | None

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        split_special_tokens: bool,
        truncation: bool,
        padding: bool,
        return_attention_mask: bool,
        verbose: bool,
    ) -> Any: ...


class Span(NamedTuple):
    """`ids[start:stop]` of an `Encoded` is the segment `name`: a field, or `template`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row in one order.

    Attributes:
        ids: token ids, never longer than `max_length`; the logits are read at the last one.
        spans: every segment in reading order; they tile `ids` without gaps.
        dropped: tokens cut away, by the place of the field (not by whose text stands there).
    """

    ids: list[int]
    spans: tuple[Span, ...]
    dropped: dict[str, int]


class InputBuilder:
    """Row -> `Encoded` in order AB, and BA where the task can swap.

    Raises:
        ConfigError: `inputs.max_length` has no room for the template and a token of each field.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task, inputs: Inputs) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._inputs = inputs
        template = inputs.template
        texts = [template.prefix, *(template.labels[name] for name in task.fields), template.suffix]
        texts += [template.turn_break, inputs.marker]
        prefix, *labels, self._suffix, self._turn_break, self._marker = self._tokenise(texts, special=True)
        bos = tokenizer.bos_token_id
        self._prefix = prefix if bos is None else [bos, *prefix]
        self._labels = dict(zip(task.fields, labels, strict=True))
        self.template_length = len(self._prefix) + sum(map(len, labels)) + len(self._suffix)
        smallest = self.template_length + len(task.fields)
        if inputs.max_length < smallest:
            raise ConfigError(
                f"inputs.max_length={inputs.max_length} is too small: the template alone takes "
                f"{self.template_length} tokens",
                remedy=f"set inputs.max_length to at least {smallest}, or shorten inputs.template",
            )

    def _tokenise(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not special,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return ids

    def encode(self, rows: Sequence[Row]) -> list[tuple[Encoded, ...]]:
        """Encode rows: for each, `(AB,)` or `(AB, BA)` where the task can swap, indexed by `task.AB`, `task.BA`.

        The texts of all rows go through one call of the tokenizer, equal ones once; the result for a row does not
        depend on the others.
        """
        texts = {turn or "": 0 for row in rows for turn in chain.from_iterable(row.fields.values())}
        ids = dict(zip(texts, self._tokenise(list(texts), special=False), strict=True))
        return [self._encode(row, ids) for row in rows]

    def _encode(self, row: Row, tokenised: dict[str, list[int]]) -> tuple[Encoded, ...]:
        names = self._task.fields
        whole = {name: self._join([tokenised[turn or ""] for turn in row.fields[name]]) for name in names}
        room = self._inputs.max_length - self.template_length
        allotted = allot([whole[name] for name in names], [self._inputs.shares[name] for name in names], room)
        kept = {
            name: cut(whole[name], tokens, self._inputs.cut[name], self._inputs.head_ratio, self._marker)
            for name, tokens in zip(names, allotted, strict=True)
        }
        orders: dict[int, dict[str, str]] = {AB: {name: name for name in names}}
        if self._task.swappable:
            orders[BA] = self._task.swapped_fields
        return tuple(self._splice(kept, source) for source in orders.values())

    def _join(self, turns: Sequence[Ids]) -> list[int]:
        joined: list[int] = []
        for index, turn in enumerate(turns):
            joined += self._turn_break if index else []
            joined += turn
        return joined

    def _splice(self, kept: dict[str, Kept], source: dict[str, str]) -> Encoded:
        """`source[place]` names the field whose text stands at `place`; labels belong to places."""
        segments: list[tuple[str, Ids]] = [("template", self._prefix)]
        for place, field in source.items():
            segments += [("template", self._labels[place]), (place, kept[field].ids)]
        segments.append(("template", self._suffix))
        ids: list[int] = []
        spans = []
        for name, part in segments:
            spans.append(Span(name, len(ids), len(ids) + len(part)))
            ids += part
        return Encoded(ids, tuple(spans), {place: kept[field].dropped for place, field in source.items()})
