"""`lengths`: every figure of the table against a plain count over the rows as the model sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModel

from pairclf.config import Config
from pairclf.data.rows import read_rows, to_rows
from pairclf.errors import ConfigError, DataError
from pairclf.inspect.lengths import Scale, batchings, lengths_of, measure, render, write_report
from pairclf.model.cost import cost_of
from pairclf.model.inputs import open_inputs

ROWS = 60


@pytest.fixture
def config(config_for: Callable[..., Config], tmp_path: Path) -> Config:
    """Rows from short to long; in some, A and B differ in their middle alone."""
    random = np.random.default_rng(0)
    texts = [[letter * int(random.integers(1, 200)) for letter in "pab"] for _ in range(ROWS)]
    for row in texts[::10]:
        row[1:] = ["s" * 90 + "a" + "e" * 90, "s" * 90 + "b" + "e" * 90]
    cells = [[json.dumps([text]) for text in row] for row in texts]
    columns = ["prompt", "response_a", "response_b"]
    frame = pl.DataFrame(cells, schema=columns, orient="row").with_row_index("id")
    labels = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    frame.with_columns(**{name: pl.lit(value) for name, value in labels.items()}).write_csv(tmp_path / "train.csv")
    made = config_for(
        "llama", data={"folder": str(tmp_path), "train": ["train.csv"]}, inputs={"truncation_marker": " … "}
    )
    made.output_dir = tmp_path / "run"
    return made


def test_the_figures_are_those_of_a_plain_count(config: Config) -> None:
    budgets, uncut = measure(config, [200, 260, 10_000], None)
    rows = to_rows(read_rows(config.data.sources, config.task, labelled=True), config.task)
    for budget in budgets:
        shown = [one[0] for one in open_inputs(config).builder.within(budget.max_length).encode(rows)]
        assert budget.rows == ROWS
        assert budget.tokens == sum(len(one.ids) for one in shown)
        assert budget.rows_cut == sum(any(one.dropped.values()) for one in shown)
        assert budget.lost == {name: sum(one.dropped[name] for one in shown) for name in config.task.fields}
    assert budgets[0].rows_cut > budgets[1].rows_cut > budgets[2].rows_cut == 0
    assert budgets[0].made_identical == 6
    assert budgets[2].made_identical == 0
    assert budgets[2].tokens == uncut.sum()
    letters = sum(len(row.fields["prompt"][0] or "") for row in rows)  # the tokenizer is byte-level
    assert budgets[0].lost_part["prompt"] == budgets[0].lost["prompt"] / letters


def test_padding_is_that_of_the_batches(config: Config) -> None:
    (budget,), uncut = measure(config, [10_000], None)
    wastes = {}
    for name, batches in batchings(config, uncut).items():
        members = [list(one) for one in batches]
        assert sorted(row for one in members for row in one) == list(range(ROWS))
        computed = sum(len(one) * max(uncut[row] for row in one) for one in members)
        wastes[name] = 1 - uncut.sum() / computed
    assert budget.padding == pytest.approx(wastes)
    random, in_steps, by_size, _, packed = wastes.values()
    assert random >= in_steps >= by_size > packed == 0


def test_the_cost_counts_the_operations_of_a_forward_pass(config: Config) -> None:
    """Against torch's own counter, which sees every matrix product: attention in full, as it is computed here."""
    from torch.utils.flop_counter import FlopCounterMode

    cost = cost_of(config)
    model = AutoModel.from_pretrained(config.model.base, dtype=torch.float32, attn_implementation="eager")
    for tokens in (16, 256):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.ones(1, tokens, dtype=torch.long))
        full = cost.linear * tokens + 2 * cost.quadratic * tokens**2  # ours counts the half under the causal mask
        assert counter.get_total_flops() == pytest.approx(full, rel=0.01)


def test_costs_are_scaled_to_the_rows_asked_for(config: Config) -> None:
    (budget,), _ = measure(config, [300], None)
    one, many = Scale(ROWS, 1, 1.0), Scale(10 * ROWS, 2, 4.0)
    assert one.hours(budget) == pytest.approx(budget.operations / 3.6e15)
    assert many.hours(budget) == pytest.approx(5 * one.hours(budget))


def test_the_report_opens_without_a_network(config: Config, tmp_path: Path) -> None:
    budgets, uncut = measure(config, [200, 400], None)
    scale = Scale(25_000, 2, 48)
    figures, page = write_report(tmp_path / "out", budgets, uncut, scale, "my rows")
    assert [one["max_length"] for one in json.loads(figures.read_text())["budgets"]] == [200, 400]
    shown = page.read_text(encoding="utf-8")
    for name in ("my rows", "rows cut", "made identical", "response_a", "packed", "Rows by their uncut length"):
        assert name in shown
    assert sum(int(count) for count in re.findall(r"to [\d.,]+: (\d+)</title>", shown)) == ROWS, "the histogram"
    assert shown.count("<circle") == 2 * (2 + 3 + 5 + 1), "at each budget: cut rows, lost tokens, padding and hours"
    tables = render(budgets, scale)
    assert [len(table.rows) for table in tables] == [2, 2]


def test_a_file_without_labels_is_measured_by_the_same_recipe(config: Config, tmp_path: Path) -> None:
    train = pl.read_csv(tmp_path / "train.csv", infer_schema=False)
    train.select("id", *config.task.fields).write_csv(tmp_path / "test.csv")
    (labelled,), _ = measure(config, [300], None)
    (unlabelled,), _ = measure(config, [300], tmp_path / "test.csv")
    assert labelled == unlabelled


def test_budgets_that_can_not_be_are_told(config: Config, tmp_path: Path) -> None:
    assert lengths_of("512,1024", config) == [512, 1024]
    assert len(lengths_of(None, config)) == 7
    for text in ("1k", "0", "-5", "", "9" * 30):
        with pytest.raises(ConfigError, match="no list of whole numbers"):
            lengths_of(text, config)
    with pytest.raises(ConfigError, match="at least"):
        measure(config, [8, 300], None)
    with pytest.raises(DataError, match="no such file"):
        measure(config, [300], tmp_path / "missing.csv")
