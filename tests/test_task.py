"""Swap is an involution, keeps ties, and is defined for presets and for users' own tasks alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pairclf.config import resolve
from pairclf.task import LMSYS, TASKS, WSDM, Row, Task, competition, hidden_rows

TURNS = st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=3).map(tuple)


@given(st.tuples(TURNS, TURNS, TURNS), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_swapping_twice_changes_nothing(texts: tuple[tuple[str | None, ...], ...], target: list[float]) -> None:
    row = Row("7", dict(zip(LMSYS.fields, texts, strict=True)), tuple(target), weight=2.0)
    swapped = LMSYS.swap_row(row)
    assert LMSYS.swap_row(swapped) == row
    assert swapped.fields["prompt"] == row.fields["prompt"]
    assert swapped.fields["response_a"] == row.fields["response_b"]
    assert swapped.target is not None
    assert swapped.target == (target[1], target[0], target[2])


def test_swapped_columns_of_the_presets() -> None:
    assert LMSYS.swapped_columns == (1, 0, 2)
    assert WSDM.swapped_columns == (1, 0)
    assert all(known.task.swappable for known in TASKS.values())


def test_a_competition_is_one_record() -> None:
    """The Getting Started competition has LMSYS's files and metric: bundles of one serve the other."""
    started = competition("llm-classification-finetuning")
    assert started is not None
    assert started.task is LMSYS
    assert (started.hours, started.hidden_rows) == (9, 25_000)
    assert [known.slug for known in TASKS.values()] == list(dict.fromkeys(known.slug for known in TASKS.values()))
    assert competition("another") is None
    assert hidden_rows("another") == hidden_rows(TASKS["wsdm"].slug) == 25_000


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (LMSYS, "multiclass"),
        (WSDM, "binary"),
        (Task(name="tags", fields=("text",), classes=("x",), multi_label=True), "multilabel"),
    ],
)
def test_kinds_of_tasks(task: Task, kind: str) -> None:
    assert task.kind == kind


def test_a_task_of_single_texts_does_not_swap() -> None:
    task = Task(name="toxic", fields=("text",), classes=("clean", "toxic"), label_column="label")
    assert not task.swappable
    assert task.swapped_columns == (0, 1)
    row = Row("1", {"text": ("a",)}, (0.0, 1.0))
    assert task.swap_row(row) == row


def test_a_reward_model_reads_pointwise_the_prompt_and_one_side() -> None:
    task = LMSYS.pointwise
    assert (task.fields, task.classes, task.multi_turn) == (("prompt", "response"), ("reward",), True)
    assert not task.swappable
    by_side = {"prompt": 0.4, "response_a": 0.3, "response_b": 0.3}
    tokens = {"prompt": 5, "response_a": 7, "response_b": 7}
    inputs = {"budget_shares": by_side, "min_tokens": tokens, "max_length": 64}
    config = resolve({"task": "lmsys", "model": {"readout": "reward"}, "inputs": inputs})
    alone = config.pointwise()
    assert (alone.orders, alone.is_pointwise, config.is_pointwise) == (1, True, False)
    assert alone.inputs.budget_shares == {"prompt": 0.4, "response": 0.3}
    assert alone.inputs.min_tokens == {"prompt": 5, "response": 7}
    assert alone.inputs.truncation == dict.fromkeys(task.fields, "head_tail")
    assert alone.inputs.template == config.inputs.template
    assert config.inputs.min_tokens == tokens, "the pairs' own is as it was"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fields": ("a", "a")}, "one thing twice"),
        ({"fields": ("a", "id")}, "pairclf's own"),
        ({"classes": ("x", "ab_x")}, r"\['ab_x'\] are words of pairclf's own"),
        ({"classes": ("x_BA", "y", "x")}, r"\['x_BA'\] are words of pairclf's own"),
        ({"swap_fields": ("a", "b")}, "together or not at all"),
        ({"swap_fields": ("a", "x"), "swap_classes": ("u", "v")}, "must be among fields"),
        ({"swap_fields": ("a", "b"), "swap_classes": ("u", "x")}, "must be among classes"),
        ({"multi_label": True, "label_column": "l"}, "multi_label"),
        ({}, "swap_fields is not set"),
        ({"swap_fields": ("a", "a"), "swap_classes": ("u", "v")}, r"swap_fields \['a', 'a'\] name one thing twice"),
        ({"fields": ("a",), "classes": ("u",)}, "name one class"),
    ],
)
def test_an_inconsistent_task_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Task.model_validate({"name": "t", "fields": ("a", "b"), "classes": ("u", "v"), **wrong})


@pytest.mark.parametrize("answer", [{"swap_fields": None}, {"multi_label": True}])
def test_several_fields_need_an_answer_about_the_swap(answer: dict[str, object]) -> None:
    task = Task.model_validate({"name": "t", "fields": ("a", "b"), "classes": ("u", "v"), **answer})
    assert not task.swappable
    assert Task.model_validate(task.model_dump(mode="json")) == task  # as a bundle keeps it


def test_classes_may_be_numbers_and_booleans_of_yaml() -> None:
    task = Task.model_validate({"name": "t", "fields": ["a"], "classes": [0, 1.0, True, "x", 0.5]})
    assert task.classes == ("0", "1", "true", "x", "0.5")
