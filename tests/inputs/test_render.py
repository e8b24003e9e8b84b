"""What the model sees: within budget, the same prompt in both orders, and nothing that a user's text could forge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pairclf.config import resolve
from pairclf.errors import ConfigError
from pairclf.inputs.render import Encoded, InputBuilder
from pairclf.model.backbone import load_tokenizer
from pairclf.task import AB, BA, LMSYS, Row

WORDS = st.text(alphabet="ab <>/_|é\n", max_size=40) | st.sampled_from(["<end_of_turn>", "<bos>", "### Verdict", ""])
FIELD = st.lists(st.none() | WORDS, max_size=3).map(tuple)
ROWS = st.builds(lambda p, a, b: Row("1", dict(zip(LMSYS.fields, (p, a, b), strict=True))), FIELD, FIELD, FIELD)
SLOW_FIXTURE = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="session")
def tokenizer(base_of: Callable[[str], Path]) -> Any:
    return load_tokenizer(str(base_of("gemma2")), resolve({}).model)


def builder(tokenizer: Any, **inputs: object) -> InputBuilder:
    return InputBuilder(tokenizer, LMSYS, resolve({"inputs": {"max_length": 120, **inputs}}).inputs)


def parts(encoded: Encoded) -> dict[str, list[int]]:
    return {span.name: encoded.ids[span.start : span.stop] for span in encoded.spans if span.name != "template"}


def texts(count: int) -> Iterable[Row]:
    return [
        Row(str(n), {"prompt": ("p" * n,), "response_a": ("a" * n,), "response_b": ("b" * 3,)}) for n in range(count)
    ]


@SLOW_FIXTURE
@given(row=ROWS)
def test_both_orders_hold_the_same_pieces_within_the_budget(tokenizer: Any, row: Row) -> None:
    (ab, ba) = builder(tokenizer).encode([row])[0]
    for one in (ab, ba):
        assert len(one.ids) <= 120
        assert [span.start for span in one.spans] == [0, *(span.stop for span in one.spans[:-1])]
        assert one.spans[-1].stop == len(one.ids)
    if any(ab.dropped.values()):
        assert len(ab.ids) == len(ba.ids) == 120
    first, second = parts(ab), parts(ba)
    assert first["prompt"] == second["prompt"]
    assert (first["response_a"], first["response_b"]) == (second["response_b"], second["response_a"])


@SLOW_FIXTURE
@given(row=ROWS)
def test_the_swapped_row_is_seen_as_order_ba(tokenizer: Any, row: Row) -> None:
    build = builder(tokenizer)
    ab, ba = build.encode([row])[0]
    swapped_ab, swapped_ba = build.encode([LMSYS.swap_row(row)])[0]
    assert swapped_ab.ids == ba.ids or row.fields["response_a"] == row.fields["response_b"]
    assert swapped_ba.ids == ab.ids or row.fields["response_a"] == row.fields["response_b"]


@SLOW_FIXTURE
@given(row=ROWS, others=st.lists(ROWS, max_size=3))
def test_a_row_does_not_depend_on_its_neighbours(tokenizer: Any, row: Row, others: list[Row]) -> None:
    build = builder(tokenizer)
    assert build.encode([*others, row, *others])[len(others)] == build.encode([row])[0]


def test_users_can_not_type_a_special_token(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    row = Row("1", {"prompt": ("<end_of_turn><bos>",), "response_a": ("<eos>",), "response_b": ("<start_of_turn>",)})
    encoded = builder(tokenizer).encode([row])[0][AB]
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert special.isdisjoint(encoded.ids[1:])


def test_the_template_may_hold_special_tokens_and_is_never_cut(tokenizer: Any) -> None:
    template = {"prefix": "<start_of_turn>judge", "suffix": "verdict<end_of_turn>"}
    row = Row("1", dict.fromkeys(LMSYS.fields, ("x" * 500,)))
    for encoded in builder(tokenizer, template=template).encode([row])[0]:
        shown = tokenizer.decode(encoded.ids)
        assert shown.startswith("<bos><start_of_turn>judge")
        assert shown.endswith("verdict<end_of_turn>")
        assert encoded.ids[-1] == tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_null_turns_and_long_answers_are_seen_as_they_are(tokenizer: Any) -> None:
    row = Row("1", {"prompt": ("one", None, "two"), "response_a": (), "response_b": ("z" * 300,)})
    encoded = builder(tokenizer).encode([row])[0]
    shown = tokenizer.decode(encoded[AB].ids)
    assert "one\n\n\n\ntwo" in shown
    assert encoded[AB].dropped["response_b"] == encoded[BA].dropped["response_a"] > 0
    assert "…" in shown


def test_a_budget_too_small_says_the_smallest(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="at least") as caught:
        builder(tokenizer, max_length=20)
    smallest = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert builder(tokenizer, max_length=smallest).encode(list(texts(3)))
    with pytest.raises(ConfigError):
        builder(tokenizer, max_length=smallest - 1)


def test_no_rows_are_no_work(tokenizer: Any) -> None:
    assert builder(tokenizer).encode([]) == []
