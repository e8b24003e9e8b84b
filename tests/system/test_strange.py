"""Rows that nobody would send, through everything that looks at rows: no traceback, and every promise about inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import yaml
from tests_support import strange_file

from pairclf.config import load_config
from pairclf.data.rows import to_rows
from pairclf.inputs.render import TEMPLATE
from pairclf.model.inputs import encoded_rows, open_inputs
from pairclf.run import labelled_rows
from pairclf.task import AB, BA

MENDED = {"missing_id": "fix", "duplicate_id": "fix", "undecodable": "fix", "bad_label": "drop"}


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("turns", ["sides", "interleaved"])
def test_commands_take_strange_rows_all_the_way(
    tmp_path: Path, base_of: Callable[[str], Path], cli: Callable[..., tuple[int, str]], count: int, turns: str
) -> None:
    path = tmp_path / "strange.yaml"
    tree = {
        "output_dir": str(tmp_path / "run"),
        "data": {"folder": str(tmp_path), "train": [strange_file(tmp_path, count).name], "rules": MENDED},
        "inputs": {"max_length": 260, "template": {"turns": turns}},
        "model": {"base": str(base_of("llama"))},
    }
    path.write_text(yaml.safe_dump(tree))
    for arguments in (
        ["check", tmp_path / "strange.csv", "--task", path, "--out", tmp_path / "audit.json"],
        ["folds", path],
        ["folds", path, "folds.stable=true"],
        ["lengths", path, "--at", "260,999"],
        ["show", path],
    ):
        code, shown = cli(*arguments)
        assert code == 0, shown
    config = load_config(path)
    frame = labelled_rows(config)
    opened = open_inputs(config)
    special = set(opened.tokenizer.all_special_ids)
    for row, (ab, ba) in zip(to_rows(frame, config.task), encoded_rows(config, opened.builder, frame), strict=True):
        assert max(len(ab.ids), len(ba.ids)) <= 260, row.id
        for one in (ab, ba):
            typed = [one.ids[start:stop] for name, start, stop in one.spans if name != TEMPLATE]
            assert all(special.isdisjoint(ids.tolist()) for ids in typed), row.id
        assert ab.dropped["prompt"] == ba.dropped["prompt"], row.id
        swapped = opened.builder.encode([config.task.swap_row(row)])[0]
        if row.fields["response_a"] != row.fields["response_b"]:
            assert swapped[AB].ids.tolist() == ba.ids.tolist(), row.id
            assert swapped[BA].ids.tolist() == ab.ids.tolist(), row.id
    folds = pl.read_csv(tmp_path / "run" / "folds.csv", infer_schema=False)
    assert folds["id"].to_list() == frame["id"].to_list()
