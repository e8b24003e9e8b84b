"""Wording and special tokens: `InputBuilder` turns a row into token ids and the spans of its segments.

The same builder, made from the same saved recipe, serves training, validation and the notebook. A template is a list
of segments. Every one of them, and every turn of a row, is tokenised alone, once, and spliced by ids: both orders of
a row come from one tokenisation, and the prompt has the same ids in both. The template's own text may hold the
tokenizer's special tokens; the users' text never makes one, nor another control token such as `<tool_call>`
(`TurnTokenizer`): whatever is typed inside a response stays plain text, so that nobody can close a segment of a chat
template or open the model's answer from inside a response.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

from pairclf.config import Inputs, Template
from pairclf.config.wording import LABEL
from pairclf.errors import ConfigError, ModelError
from pairclf.inputs.tokenise import TurnTokenizer, settle_template
from pairclf.inputs.truncate import Ids, Kept, allot, cut, pick_rounds
from pairclf.task import AB, BA, SIDE, Row, Task

TEMPLATE, MARKER = "template", "marker"
ROUNDS, EXAMPLES = "rounds", "examples"
BRANCH = -1
"""Stands in a sequence's ids before each of its branches: what they all begin with is there once, before the first.

A sequence without one is one branch. Lengths count the mark as a token.
"""
RATIONALE = -2
"""Stands in a sequence's ids for each token that the model may write there before the sequence is scored."""
_NOTHING: Ids = np.zeros(0, dtype=np.int32)
_MARKERS = 100  # are tokenised at a time
_LABEL = f"{{{LABEL}}}"

TokenisedRow = Mapping[str, Sequence[Ids]]
"""The token ids of every turn of every field, uncut."""

Choose = Callable[[str, TokenisedRow], Sequence[int]]
"""The numbers of the examples before a row, by its id and its tokens."""

_Segment = tuple[str, Ids]
_Round = dict[str, list[_Segment]]
"""The visible segments of each field in one round; or, under the only key `MARKER`, the marker for omitted rounds."""


class Span(NamedTuple):
    """`ids[start:stop]` of an `Encoded` is (a piece of) the segment `name`: a field, `template` or `marker`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row in one order.

    Attributes:
        ids: `(T,)` int32, never longer than `max_length`; the logits are read at the last one, or at the last one of
            each branch (`BRANCH`).
        spans: every segment in reading order; they tile `ids` without gaps. A field's spans are slices of its text.
        dropped: tokens cut away, by the place of the field (not by whose text stands there).
    """

    ids: Ids
    spans: tuple[Span, ...]
    dropped: dict[str, int]


class _Visible(NamedTuple):
    """What is seen of a row: segments by round; by field, tokens cut away, and what stays of its tokens."""

    rounds: list[_Round]
    dropped: dict[str, int]
    kept: dict[str, list[tuple[Ids, Kept]]]


class InputBuilder:
    """Row -> `Encoded` in order AB, and BA where the task can swap.

    Args:
        tokenizer: a fast tokenizer of transformers, or the one of the library tokenizers that it is made of.
        task: the fields and what a swap exchanges.
        inputs: budget, wording and cuts. A template for chat models is put into the tokenizer's chat template here,
            unless `settle_template` did so before.
        one_sided: the template shows one of the two sides, `task.SIDE`; a row is one sequence, with a branch a side.
        example: template of an example (`preceded_by`); empty: there are none.
        rationale: most tokens that the model writes behind the text.
        trigger: what follows them.

    Attributes:
        endings: the template's words behind the last field, which the model reads last: of each label, or one.
        opening: what the tokenizer puts before an input, most often nothing or its BOS.
        closing: what it puts behind the endings, most often nothing.
        smallest: the smallest budget that every row fits into, whatever its lengths; and `smallest_example`.

    Raises:
        ConfigError: the tokenizer has no chat template, or `inputs.max_length` has no room for the wording and the
            smallest part of each field.
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        inputs: Inputs,
        *,
        one_sided: bool = False,
        example: str = "",
        rationale: int = 0,
        trigger: str = "",
    ) -> None:
        template = settle_template(inputs.template, tokenizer)
        self.tokenizer = TurnTokenizer(tokenizer)
        self._task = task
        self._places = task.places(one_sided=one_sided)
        self._inputs = inputs
        ratio = inputs.head_ratio
        self._head_ratio = ratio if isinstance(ratio, dict) else dict.fromkeys(task.fields, ratio)
        self._markers: dict[int, Ids] = {}
        longest = self._marker_texts(10**digits - 1 for digits in range(1, 8))
        self._longest_marker = max(map(len, self.tokenizer(longest, special=True)))
        self._turn_break = self._wording(template.turn_separator)
        self._stem, self._tails, self.endings = self._segments(template)
        self._round = self._parsed(template.round)
        shown: list[str | None] = [*template.labels.values()] or [None]
        self._example_by_label = [self._parsed(example, label=label) for label in shown]
        self._examples: Sequence[tuple[Ids, ...]] = ()  # each in every order
        self._choose: Choose = lambda row_id, row: ()
        self._reserve = 0  # most tokens of a row's examples
        surrounds = bool(template.add_special_tokens)
        self.opening = self.tokenizer.before if surrounds else _NOTHING
        self.closing = self.tokenizer.after if surrounds else _NOTHING
        self._orders: dict[int, dict[str, str]] = {AB: {name: name for name in task.fields}}
        if one_sided:
            self._stem = self._branched(self._stem)
        elif task.swappable:
            self._orders[BA] = task.swapped_fields
        if rationale:
            marks: Ids = np.full(rationale, RATIONALE, dtype=np.int32)
            self._stem = [*self._stem, (TEMPLATE, marks), (TEMPLATE, self._wording(trigger))]
            self.endings = [trigger]
        self._outer = [*self._stem, *self._branches([()])]
        self.smallest = self._smallest(self._outer)
        self.smallest_example = max(map(self._smallest, self._example_by_label))
        self._check(inputs.max_length)

    def _check(self, max_length: int) -> None:
        if max_length < self.smallest:
            raise ConfigError(
                f"inputs.max_length={max_length} is too small for what is never cut and the least of each field",
                remedy=f"set inputs.max_length to at least {self.smallest}, or shorten inputs.template",
            )

    @property
    def max_length(self) -> int:
        """The budget of one row in one order, in tokens."""
        return self._inputs.max_length

    def within(self, max_length: int) -> InputBuilder:
        """The same recipe with another budget.

        Raises:
            ConfigError: it is too small.
        """
        self._check(max_length)
        other = copy(self)
        other._inputs = self._inputs.model_copy(update={"max_length": max_length})
        return other

    def require_embeddings(self, embeddings: int) -> None:
        """Do nothing if a base has an embedding for every token that an input may hold.

        A CPU fails at the first such token, hours after the start; a GPU is then lost to the process. Control tokens
        stand in no text, and so do no harm unless the wording has them: many tokenizers have such a padding token.

        Args:
            embeddings: of the base; ids are below it.

        Raises:
            ModelError: names the tokens.
        """
        wording = np.concatenate(
            [
                self._marker(1),
                self._turn_break,
                *(ids for _, ids in chain(self._outer, self._round, *self._example_by_label)),
            ]
        ).tolist()
        beyond = self.tokenizer.from_id(embeddings)
        reached = sorted((beyond.keys() - self.tokenizer.control) | {token for token in wording if token >= embeddings})
        if reached:
            named = ", ".join(f"{beyond.get(token)!r} ({token})" for token in reached[:5])
            more = f" and {len(reached) - 5:,} more" if len(reached) > 5 else ""
            raise ModelError(
                f"the base model has embeddings for token ids below {embeddings:,}, and its tokenizer also writes "
                f"{named}{more}",
                remedy="use the tokenizer that the base model was published with, or save the model with an embedding "
                "for each token (`resize_token_embeddings` of transformers)",
            )

    def continued_by(self, nodes: Sequence[Sequence[int]]) -> InputBuilder:
        """The same recipe with these tokens behind the text of every row: a branch for each, if they are several.

        They count towards its budget.

        Raises:
            ConfigError: the budget is too small.
        """
        return self._of([*self._stem, *self._branches(nodes)])

    def _branches(self, nodes: Sequence[Sequence[int]]) -> list[_Segment]:
        """What stands behind the text: each label's own end of it, with each of these behind."""
        branches = [(*tail, *node) for tail in self._tails for node in nodes]
        pieces = chain.from_iterable(((BRANCH,), branch) for branch in branches) if len(branches) > 1 else branches
        return [(TEMPLATE, np.array(piece, dtype=np.int32)) for piece in pieces if len(piece)]

    def preceded_by(
        self, examples: Sequence[Row], answers: Sequence[Sequence[Ids]], choose: Choose, *, k: int, max_length: int
    ) -> InputBuilder:
        """The same recipe with examples before the text of every row, which count towards its budget.

        Where the task can swap, one of a row's orders is preceded by the examples and the other by their mirrors, by
        the texts in their places: so the orders differ in nothing but the position, and a row's mirror has the same
        two sequences.

        Args:
            examples: rows to choose from; where each label is asked for by itself, each of them about the next label.
            answers: the tokens behind each, in its order AB and in its order BA.
            choose: says which of them stand before a row, in their order.
            k: how many these are at most.
            max_length: the budget of an example, answer included; longer ones are cut as rows are.

        Raises:
            ConfigError: a budget is too small.
        """
        longest = max(len(ids) for orders in answers for ids in orders)
        recipes = [self._of(example).within(max_length - longest) for example in self._example_by_label]
        shown = [recipes[number % len(recipes)].encode([row])[0] for number, row in enumerate(examples)]
        other = copy(self)
        other._examples = [
            tuple(np.concatenate([example.ids, ids]) for example, ids in zip(orders, labels, strict=False))
            for orders, labels in zip(shown, answers, strict=True)
        ]
        other._reserve = sum(sorted(max(map(len, orders)) for orders in other._examples)[-k:])
        other._choose = choose
        return other._of(self._outer)

    def _of(self, outer: list[_Segment]) -> InputBuilder:
        """The same recipe with other segments around the fields.

        Raises:
            ConfigError: the budget is too small.
        """
        other = copy(self)
        other._outer, other.smallest = outer, other._smallest(outer)
        other._check(self.max_length)
        return other

    def _wording(self, text: str) -> Ids:
        return self.tokenizer([text], special=True)[0]

    def _parts(self, text: str) -> list[str]:
        """The words of a template and, at every second place, the name of the place holder between them."""
        holders = "|".join(map(re.escape, (*self._places, ROUNDS, EXAMPLES)))
        return re.split(rf"\{{({holders})\}}", text)

    def _segments(self, template: Template) -> tuple[list[_Segment], list[Sequence[int]], list[str]]:
        """The segments of the whole in reading order, where a place holder has no ids yet; and its ends.

        The ends are those of the labels' texts that differ, as ids, and their last words. Without labels there is one,
        and the segments hold it.
        """
        text, special = (template.instruction or "") + template.text, template.add_special_tokens
        labels = list(template.labels.values())
        shown: list[str | None] = [*labels] or [None]
        wholes = [self._parsed(text, start=True, special=special, label=label) for label in shown]
        last_words = self._parts(template.text)[-1]
        if not template.labels:
            return wholes[0], [()], [last_words]
        ends = [whole[-1][1].tolist() for whole in wholes]
        columns = enumerate(zip(*ends, strict=False))
        common = next((place for place, tokens in columns if len({*tokens}) > 1), min(map(len, ends)))
        stem = [*wholes[0][:-1], (TEMPLATE, np.array(ends[0][:common], dtype=np.int32))]
        return stem, [ids[common:] for ids in ends], [last_words.replace(_LABEL, label) for label in labels]

    def _parsed(
        self, text: str, *, start: bool = False, special: bool | None = False, label: str | None = None
    ) -> list[_Segment]:
        """The segments of a template.

        Args:
            text: the template.
            start: whether an input begins with it.
            special: whether to put the tokenizer's own tokens around it.
            label: stands at the place of the label; None: there is no such place.
        """
        pieces = self._parts(text)
        segments: list[_Segment] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                segments.append((piece, _NOTHING))
                continue
            words = piece if label is None else piece.replace(_LABEL, label)
            ids = self.tokenizer([words], special=True, start=start and place == 0)[0]
            if special:
                ids = self._with_special_tokens(ids, first=place == 0, last=place == len(pieces) - 1)
            segments += [(TEMPLATE, ids)] if len(ids) else []
        return segments

    def _branched(self, outer: list[_Segment]) -> list[_Segment]:
        """The segments of both sides: those from the place of the one side on, a branch for each."""
        at = [name for name, _ in outer].index(SIDE)
        mark: _Segment = (TEMPLATE, np.array([BRANCH], dtype=np.int32))
        branches = [[mark, (side, _NOTHING), *outer[at + 1 :]] for side in self._task.swap_fields or ()]
        return [*outer[:at], *chain.from_iterable(branches)]

    def _with_special_tokens(self, ids: Ids, *, first: bool, last: bool) -> Ids:
        """Add the tokens that `tokenizer(text)` puts before the first piece and after the last, if they are missing."""
        before, after = self.tokenizer.before, self.tokenizer.after
        if first and len(before) and not np.array_equal(ids[: len(before)], before):
            ids = np.concatenate([before, ids])
        if last and len(after) and not np.array_equal(ids[-len(after) :], after):
            ids = np.concatenate([ids, after])
        return ids

    def _smallest(self, outer: Sequence[_Segment]) -> int:
        """The smallest budget that every row fits into between these segments, whatever its lengths."""
        least, always = sum(self._inputs.min_tokens.values()), _size(outer) + self._reserve
        if not self._round:
            return always + least
        # Two rounds are always seen, and the marker for those between them.
        return always + 2 * (_size(self._round) + least) + self._longest_marker

    def _marker_texts(self, numbers: Iterable[int]) -> list[str]:
        return [self._inputs.truncation_marker.replace("{cut}", str(number)) for number in numbers]

    def _marker(self, dropped: int) -> Ids:
        """The marker for `dropped` tokens. A hundred are tokenised at once, as those near by will be asked for too."""
        if not self._inputs.truncation_marker:
            return _NOTHING
        if dropped not in self._markers:
            first = dropped - dropped % _MARKERS
            numbers = range(first, first + _MARKERS)
            self._markers |= zip(numbers, self.tokenizer(self._marker_texts(numbers), special=True), strict=True)
        return self._markers[dropped]

    # --- from rows to tokens, uncut ----------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row]) -> list[tuple[Encoded, ...]]:
        """Encode rows: for each, `(AB,)` or `(AB, BA)` where the task can swap, indexed by `task.AB`, `task.BA`.

        The texts of all rows go through one call of the tokenizer, equal ones once; the result for a row does not
        depend on the others.
        """
        return [self.assemble(tokens, row.id) for tokens, row in zip(self.tokenise(rows), rows, strict=True)]

    def tokenise(self, rows: Sequence[Row]) -> Iterator[TokenisedRow]:
        """The first half of `encode`, which depends on the tokenizer alone."""
        texts = {turn or "": 0 for row in rows for turn in chain.from_iterable(row.fields.values())}
        ids = dict(zip(texts, self.tokenizer(list(texts), special=False), strict=True))
        for row in rows:
            yield {name: [ids[turn or ""] for turn in row.fields[name]] for name in self._task.fields}

    def assemble(self, row: TokenisedRow, row_id: str) -> tuple[Encoded, ...]:
        """The second half of `encode`: cut, and splice in each order."""
        before = self._before(row, row_id)
        visible = self._visible(row, before)
        return tuple(
            self._splice(visible.rounds, visible.dropped, source, ids)
            for source, ids in zip(self._orders.values(), before, strict=True)
        )

    def lost(self, row: TokenisedRow, row_id: str) -> dict[str, int]:
        """Tokens that `assemble` cuts away, by field."""
        return self._visible(row, self._before(row, row_id)).dropped

    def kept(self, row: TokenisedRow, row_id: str) -> dict[str, list[tuple[Ids, Kept]]]:
        """Each field's tokens, uncut, with what `assemble` keeps of them; in one part, or turn by turn."""
        return self._visible(row, self._before(row, row_id)).kept

    def _before(self, row: TokenisedRow, row_id: str) -> list[Ids]:
        """A row's examples in each order."""
        examples = [self._examples[number] for number in self._choose(row_id, row)]
        return [self._mirrored(row, source, examples) for source in self._orders.values()]

    def _visible(self, row: TokenisedRow, before: Sequence[Ids]) -> _Visible:
        """What is seen of a row behind its examples, and the tokens that each field loses."""
        room = self._inputs.max_length - _size(self._outer) - max(map(len, before))
        return self._by_rounds(row, room) if self._round else self._by_sides(row, room)

    def _mirrored(self, row: TokenisedRow, source: Mapping[str, str], examples: Sequence[tuple[Ids, ...]]) -> Ids:
        """The examples before a row in an order: mirrored ones where the first side is the greater by its tokens."""
        if not examples:
            return _NOTHING
        mirrored = False
        if len(self._orders) > 1:
            first, second = ([ids.tobytes() for ids in row[source[side]]] for side in self._task.swap_fields or ())
            mirrored = first > second
        return np.concatenate([orders[mirrored] for orders in examples])

    # --- what is seen of a row ---------------------------------------------------------------------------------------

    def _by_sides(self, row: TokenisedRow, room: int) -> _Visible:
        """Each field's turns joined and cut; as one round."""
        names = self._task.fields
        fields = [self._join(row[name]) for name in names]
        parts = self._cut(names, fields, [[len(ids) for ids in row[name]] for name in names], room)
        kept = {name: [(ids, part)] for name, ids, part in zip(names, fields, parts, strict=True)}
        pieces = {name: self._pieces(name, *kept[name][0]) for name in names}
        return _Visible([pieces], {name: kept[name][0][1].dropped for name in names}, kept)

    def _join(self, turns: Sequence[Ids]) -> Ids:
        if len(turns) == 1:
            return turns[0]
        parted = [piece for turn in turns for piece in (self._turn_break, turn)]
        return np.concatenate(parted[1:]) if parted else _NOTHING

    def _by_rounds(self, row: TokenisedRow, room: int) -> _Visible:
        """Turn by turn. Fields with fewer turns than others are empty in the later rounds."""
        names = self._task.fields
        useful = {name: least + self._longest_marker for name, least in self._inputs.min_tokens.items()}
        count = max(1, *(len(row[name]) for name in names))
        turns = [{name: row[name][at] if at < len(row[name]) else _NOTHING for name in names} for at in range(count)]
        costs = [sum(map(len, turn.values())) for turn in turns]
        least = [sum(min(len(ids), useful[name]) for name, ids in turn.items()) for turn in turns]
        picked = pick_rounds(costs, _size(self._round), least, room, lambda gone: len(self._gap(costs, gone)))

        units = [(at, name) for at in picked.partial for name in names]
        fields = [turns[at][name] for at, name in units]
        cuts = self._cut([name for _, name in units], fields, [[len(ids)] for ids in fields], picked.room)
        parts = {(at, name): Kept(len(turns[at][name]), 0) for at in picked.whole for name in names}
        parts |= dict(zip(units, cuts, strict=True))
        kept = {
            name: [(turn[name], parts.get((at, name), Kept(0, 0, len(turn[name])))) for at, turn in enumerate(turns)]
            for name in names
        }
        seen = sorted({*picked.whole, *picked.partial})
        rounds: list[_Round] = [{name: self._pieces(name, *kept[name][at]) for name in names} for at in seen]
        if gone := {*range(count)} - {*seen}:  # in the middle, always
            rounds.insert(min(gone), {MARKER: [(MARKER, self._gap(costs, gone))]})
        return _Visible(rounds, {name: sum(part.dropped for _, part in kept[name]) for name in names}, kept)

    def _gap(self, costs: Sequence[int], gone: set[int]) -> Ids:
        """The marker for the omitted rounds."""
        return self._marker(sum(costs[at] for at in gone)) if gone else _NOTHING

    def _cut(
        self, names: Sequence[str], fields: Sequence[Ids], turns: Sequence[Sequence[int]], room: int
    ) -> list[Kept]:
        """What stays of each field's tokens."""
        inputs, ratio = self._inputs, self._head_ratio
        rooms = allot(
            fields, [inputs.budget_shares[name] for name in names], [inputs.min_tokens[name] for name in names], room
        )
        return [
            cut(lengths, len(self._turn_break), tokens, inputs.truncation[name], ratio[name], self._marker)
            for name, lengths, tokens in zip(names, turns, rooms, strict=True)
        ]

    def _pieces(self, name: str, ids: Ids, kept: Kept) -> list[_Segment]:
        if not kept.dropped:
            return [(name, ids)]
        marker = self._marker(kept.dropped) if kept.marked else _NOTHING
        # `ids[-0:]` would be the whole field, hence the explicit start.
        pieces = [(name, ids[: kept.head]), (MARKER, marker), (name, ids[len(ids) - kept.tail :])]
        return [piece for piece in pieces if len(piece[1])]

    # --- one order ---------------------------------------------------------------------------------------------------

    def _splice(
        self, rounds: Sequence[_Round], dropped: Mapping[str, int], source: Mapping[str, str], examples: Ids
    ) -> Encoded:
        """`source[place]` names the field whose text stands at `place`; the wording belongs to places."""
        segments: list[_Segment] = []
        for segment in self._outer:
            if segment[0] == ROUNDS:
                for round_segments in rounds:
                    segments += round_segments.get(MARKER) or chain.from_iterable(
                        _fill(inner, round_segments, source) for inner in self._round
                    )
            elif segment[0] == EXAMPLES:
                segments += [(TEMPLATE, examples)] if len(examples) else []
            else:
                segments += _fill(segment, rounds[0], source)
        ends = list(accumulate(len(ids) for _, ids in segments))
        spans = tuple(Span(name, end - len(ids), end) for (name, ids), end in zip(segments, ends, strict=True))
        ids = np.concatenate([ids for _, ids in segments])
        return Encoded(ids, spans, {place: dropped[field] for place, field in source.items()})


def _fill(segment: _Segment, round_segments: _Round, source: Mapping[str, str]) -> list[_Segment]:
    """A segment of the template as it is; a place holder as the pieces that stand at its place."""
    place = segment[0]
    if place == TEMPLATE:
        return [segment]
    return [(MARKER if name == MARKER else place, ids) for name, ids in round_segments[source[place]]]


def _size(segments: Sequence[_Segment]) -> int:
    return sum(len(ids) for _, ids in segments)


def made_identical(task: Task, tokens: TokenisedRow, encoded: Encoded) -> bool:
    """Whether A and B differ, were both truncated, and are equal after truncation."""
    if task.swap_fields is None or not all(encoded.dropped[name] for name in task.swap_fields):
        return False
    whole = [[turn.tolist() for turn in tokens[name]] for name in task.swap_fields]
    a, b = (
        [encoded.ids[start:stop].tolist() for place, start, stop in encoded.spans if place == name]
        for name in task.swap_fields
    )
    return whole[0] != whole[1] and len(a) == len(b) and all(map(_agree, a, b))


def _agree(ids: list[int], other: list[int]) -> bool:
    """Whether the lists are equal, up to one or two extra tokens at either end."""
    least = min(len(ids), len(other))
    tails = ids[len(ids) - least :] == other[len(other) - least :]
    return abs(len(ids) - len(other)) <= 2 and (ids[:least] == other[:least] or tails)
