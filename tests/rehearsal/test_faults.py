"""What the faults do to rows, mounts and processes; test_end_to_end.py has them against the real kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from pairclf.rehearsal import faults
from pairclf.rehearsal.faults import CELLS, FAULTS, Fault
from pairclf.rehearsal.mounts import Mount
from pairclf.task import LMSYS


def test_every_fault_of_the_guide_is_there() -> None:
    asked = "oom,kill,slow,null-rows,missing-model,corrupt-bundle,wrong-python,extra-columns"
    assert ",".join(FAULTS) == asked


def test_every_third_row_is_spoiled_in_every_field_and_ids_stay(tmp_path: Path) -> None:
    fault = FAULTS["null-rows"]
    assert fault.spoil_rows is not None
    frame = pl.DataFrame({"id": list(range(30)), **{name: [f'["{name}"]'] * 30 for name in LMSYS.fields}})
    spoiled = fault.spoil_rows(frame, LMSYS.fields)
    assert spoiled["id"].equals(frame["id"])
    for name in LMSYS.fields:
        same = [number for number in range(30) if spoiled[name][number] == frame[name][number]]
        assert same == [number for number in range(30) if number % 3]
        assert set(spoiled[name][::3].to_list()) == set(CELLS)
    lists = frame.with_columns(pl.Series("prompt", [["a", "b"]] * 30))
    assert fault.spoil_rows(lists, LMSYS.fields).schema == lists.schema


def test_byte_is_flipped_in_a_copy(tmp_path: Path) -> None:
    files: Mapping[str, Path] = {"a/config.yaml": tmp_path / "config.yaml", "a/big.bin": tmp_path / "big.bin"}
    for name, path in files.items():
        path.write_bytes(name.encode() * (100 if "big" in name else 1))
    before = files["a/big.bin"].read_bytes()
    mounts = [Mount("dataset", "x/wheels", {}, "wheels"), Mount("dataset", "x/bundle", files, "bundle")]
    (tmp_path / "props").mkdir()
    (_, changed), name = faults._flip_byte(mounts, tmp_path / "props")
    assert name == "a/big.bin"
    after = changed.files["a/big.bin"].read_bytes()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    assert files["a/big.bin"].read_bytes() == before
    assert changed.files["a/config.yaml"] == files["a/config.yaml"]


def test_base_model_is_missing_before_the_bundles_are() -> None:
    base, bundle = Mount("model", "a/b/c/d/1", {"x": Path()}, "base"), Mount("dataset", "a/b", {"x": Path()}, "bundle")
    assert [bool(one.files) for one in faults._leave_empty([base, bundle], Path())[0]] == [False, True]
    assert [bool(one.files) for one in faults._leave_empty([bundle], Path())[0]] == [False]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_hooks_are_python_and_every_fault_says_what_must_come(fault: Fault) -> None:
    assert fault.what
    assert (fault.must == "first cell fails") == bool(fault.says)
    if fault.hook:
        assert fault.strikes or fault.hurried
        compile(fault.module(limit=96, seconds=1.5), "hook", "exec")
    compile(fault.prelude, "prelude", "exec")
