"""What is cut when a row is longer than its budget: who gets how much, and which tokens stay.

Both rules look at one row alone and treat what a swap exchanges alike, so that a row's tokens never depend on its
neighbours, and order BA holds exactly the slices of order AB.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from pairclf.config import Cut

Ids = Sequence[int]


class Kept(NamedTuple):
    """What stays of one field: its token ids (the marker among them) and how many of its own were cut away."""

    ids: list[int]
    dropped: int


def allot(fields: Sequence[Ids], shares: Sequence[float], budget: int) -> list[int]:
    """Tokens that each field may take, by water-filling.

    A field that needs less than its share leaves the rest to those that lack, in proportion to their shares. The
    tokens that rounding leaves over go, one each, to the largest remainders; ties go by content, not by place, so
    that the allotments of A and B mirror when their texts are exchanged.

    Args:
        fields: token ids of each field, uncut.
        shares: a positive weight a field; only their proportions count.
        budget: tokens to be given out, at least 0.

    Returns:
        One number a field, at most its length; they sum to `min(budget, total length)`.

    >>> allot([range(10), range(50), range(90)], [1, 1, 1], 90)
    [10, 40, 40]
    """
    given = [0] * len(fields)
    lacking = [index for index, ids in enumerate(fields) if len(ids) > 0]
    left = budget
    while lacking:
        total = sum(Fraction(shares[index]) for index in lacking)
        level = {index: left * Fraction(shares[index]) / total for index in lacking}
        served = [index for index in lacking if len(fields[index]) <= level[index]]
        if not served:
            break
        for index in served:
            given[index] = len(fields[index])
            left -= given[index]
        lacking = [index for index in lacking if index not in served]
    else:
        return given
    for index in lacking:
        given[index] = int(level[index])
    rest = left - sum(given[index] for index in lacking)
    order = sorted(
        lacking, key=lambda index: (level[index] % 1, len(fields[index]), tuple(fields[index])), reverse=True
    )
    for index in order[:rest]:
        given[index] += 1
    return given


def cut(ids: Ids, room: int, how: Cut, head_ratio: float, marker: Ids) -> Kept:
    """Bring one field down to `room` tokens, with `marker` where tokens are missing.

    The marker is counted in `room`; where it would leave no token of the field's own, it is left out.

    >>> cut([1, 2, 3, 4, 5, 6], 5, "head_tail", 0.5, [0])
    Kept(ids=[1, 2, 0, 5, 6], dropped=2)
    """
    if len(ids) <= room:
        return Kept(list(ids), 0)
    shown = list(marker) if len(marker) < room else []
    keep = room - len(shown)
    head = {"head": keep, "tail": 0, "head_tail": round(keep * head_ratio)}[how]
    tail = keep - head
    # `ids[-0:]` would be the whole field, hence the explicit start.
    return Kept([*ids[:head], *shown, *ids[len(ids) - tail :]], len(ids) - keep)
