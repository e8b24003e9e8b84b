"""Mounts in the layouts that Kaggle has had, a hidden test made of the public one, and the meter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import psutil
import pytest
from clocks_support import comes_true
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.errors import PackagingError
from pairclf.rehearsal.hidden_test import enlarge, read_raw, write_raw
from pairclf.rehearsal.mounts import LAYOUTS, Mount, fill, lay_out
from pairclf.rehearsal.resource_monitor import ResourceMonitor, memory_of, with_descendants
from pairclf.task import LMSYS

MOUNTS = [
    Mount("dataset", "someone/a-notebook-bundle", {}, "bundle"),
    Mount("competition", "lmsys-chatbot-arena", {}, "competition"),
    Mount("model", "google/gemma-2/transformers/gemma-2-9b-it/2", {}, "base"),
]


@pytest.mark.parametrize(
    ("layout", "places"),
    [
        ("flat", ["a-notebook-bundle", "lmsys-chatbot-arena", "gemma-2/transformers/gemma-2-9b-it/2"]),
        (
            "typed",
            [
                "datasets/someone/a-notebook-bundle",
                "competitions/lmsys-chatbot-arena",
                "models/google/gemma-2/transformers/gemma-2-9b-it/2",
            ],
        ),
    ],
)
def test_layouts(layout: str, places: list[str], tmp_path: Path) -> None:
    assert [LAYOUTS[layout](mount) for mount in MOUNTS] == places
    lay_out(tmp_path, MOUNTS, layout)
    assert all((tmp_path / place).is_dir() for place in places)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "mounts are empty until they are filled"


@pytest.mark.parametrize("copies", [True, False])
def test_files_are_linked_or_copied(tmp_path: Path, copies: bool) -> None:
    source = tmp_path / "here.bin"
    source.write_bytes(b"1")
    mount = Mount("dataset", "someone/thing", {"deep/there.bin": source}, "bundle")
    lay_out(tmp_path / "input", [mount], "flat")
    fill(tmp_path / "input", mount, "flat", copies=copies)
    target = tmp_path / "input" / "thing" / "deep" / "there.bin"
    assert target.read_bytes() == b"1"
    assert target.samefile(source) is not copies, "a copy's permissions may be changed, a link's are the original's"


@settings(max_examples=15, deadline=None)
@given(
    ids=st.one_of(
        st.lists(st.integers(-5, 50), min_size=1, max_size=6, unique=True),
        st.lists(st.text("a-01", min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
    ),
    rows=st.integers(1, 20),
    parquet=st.booleans(),
    data=st.data(),
)
def test_hidden_test_has_the_rows_asked_for_under_ids_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, ids: list[object], rows: int, parquet: bool, data: st.DataObject
) -> None:
    folder, suffix = tmp_path_factory.mktemp("hidden"), ".parquet" if parquet else ".csv"
    order = data.draw(st.permutations(range(len(ids))))
    test, sample = folder / f"test{suffix}", folder / f"sample{suffix}"
    texts = [f'text {number}, "{number}"\n' for number in range(len(ids))]
    write_raw(test, pl.DataFrame({"id": ids, "prompt": texts}))
    write_raw(
        sample, pl.DataFrame({"id": [ids[place] for place in order], "p": [str(texts[place]) for place in order]})
    )
    (folder / "made").mkdir()
    made_test, made_sample = (read_raw(path) for path in enlarge(test, sample, rows, folder / "made", ["prompt"]))

    assert len(made_test) == len(made_sample) == rows
    assert made_test["id"].n_unique() == rows
    assert made_test.schema == read_raw(test).schema, "a column's type is Kaggle's, not ours"
    endings = ["" if row < len(ids) else f" ({row // len(ids) + 1})" for row in range(rows)]
    assert made_test["prompt"].to_list() == [texts[row % len(ids)] + endings[row] for row in range(rows)]
    joined = made_test.join(made_sample, on="id")
    assert len(joined) == rows, "both files have the same ids"
    assert all(map(str.startswith, joined["prompt"], joined["p"])), "an id stands for the same row in both"
    if rows <= len(ids):
        assert made_test["id"].cast(pl.String).to_list() == [str(one) for one in ids[:rows]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_repeated_rows_are_inputs_of_their_own(tmp_path: Path, suffix: str) -> None:
    """Equal inputs are scored once: repeated as they are, they would be no load."""
    turns = [["one", "two"], ['\u00e9 "quoted"'], [None]]
    cells = ['["one", "two"]', "plain", '["cut', '{"a": 1}', None, "[null]", '["\\ud83d"]']
    prompts: list[object] = [*turns] if suffix == ".parquet" else [*cells]
    frame = pl.DataFrame({"id": range(len(prompts)), "prompt": prompts, "response_a": ["a"] * len(prompts)})
    test, sample, made = tmp_path / f"test{suffix}", tmp_path / f"sample{suffix}", tmp_path / "made"
    made.mkdir()
    write_raw(test, frame)
    write_raw(sample, frame.select("id"))
    rows = read_raw(enlarge(test, sample, 3 * len(prompts), made, LMSYS.fields)[0])
    assert rows["prompt"].n_unique() == len(rows)
    assert rows["response_a"].unique().to_list() == ["a"]
    again = rows["prompt"].to_list()[len(prompts) : 2 * len(prompts)]
    if suffix == ".parquet":
        assert again == [["one", "two (2)"], ['\u00e9 "quoted" (2)'], [" (2)"]]
    else:
        assert [json.loads(again[place]) for place in (0, 5, 6)] == [
            ["one", "two (2)"], [" (2)"], ["\ud83d (2)"],
        ]  # fmt: skip
        assert again[1:5] == ["plain (2)", '["cut (2)', '{"a": 1} (2)', " (2)"]


def test_ids_that_look_like_ours_stay_apart(tmp_path: Path) -> None:
    for ids in (["a", "a-again1"], ["1", "01"]):
        pl.DataFrame({"id": ids}).write_csv(tmp_path / "test.csv")
        pl.DataFrame({"id": ids}).write_csv(tmp_path / "sample.csv")
        (tmp_path / "made").mkdir(exist_ok=True)
        made, _ = enlarge(tmp_path / "test.csv", tmp_path / "sample.csv", 9, tmp_path / "made", [])
        assert read_raw(made)["id"].n_unique() == 9


def test_hidden_test_has_the_ids_in_the_columns_of_its_files(tmp_path: Path) -> None:
    pl.DataFrame({"row": [7, 8], "text": ["a", "b"]}).write_csv(tmp_path / "test.csv")
    pl.DataFrame({"p": [0, 0], "key": [8, 7]}).write_csv(tmp_path / "sample.csv")
    (tmp_path / "made").mkdir()
    made = enlarge(tmp_path / "test.csv", tmp_path / "sample.csv", 4, tmp_path / "made", ["text"], ("row", "key"))
    test, sample = map(read_raw, made)
    assert test["text"].to_list() == ["a", "b", "a (2)", "b (2)"]
    assert sorted(test["row"]) == sorted(sample["key"]) == ["10", "7", "8", "9"]


def test_hidden_test_of_files_that_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("id,prompt\n1,a\n")
    (tmp_path / "sample.csv").write_text("id,p\n2,0.5\n")
    with pytest.raises(PackagingError, match="different ids"):
        enlarge(tmp_path / "test.csv", tmp_path / "sample.csv", 5, tmp_path, [])
    (tmp_path / "sample.csv").write_text("row,p\n2,0.5\n")
    with pytest.raises(PackagingError, match="no column 'id'"):
        enlarge(tmp_path / "test.csv", tmp_path / "sample.csv", 5, tmp_path, [])


HOLD = "import subprocess, sys, time; held = bytearray([1]) * {}; {}; time.sleep(600)"
NESTED = HOLD.format(10_000_000, f"subprocess.Popen([sys.executable, '-c', {HOLD.format(150_000_000, '0')!r}])")


def test_meter_sees_children_and_kills_the_largest(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", NESTED]) as process:
        try:
            with ResourceMonitor(process.pid, 1, 120e6, tmp_path, 1e9, enforced=True) as meter:
                assert comes_true(lambda: meter.killed)
            assert "killed the largest process, with 0.1" in meter.killed[0]
            assert meter.peak > 120e6
            assert process.poll() is None, "it is ours, and smaller"
        finally:
            process.kill()


def test_meter_of_what_has_ended() -> None:
    this = psutil.Process()
    assert this in with_descendants(os.getppid())
    assert memory_of(this) > 10e6
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ended = psutil.Process(process.pid)
    assert memory_of(ended) == 0
    assert with_descendants(process.pid) == []
