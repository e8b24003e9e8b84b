"""What the faults do to rows, mounts and processes; tests/system/test_kernels.py has them against real kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import polars as pl
import pytest
from clocks_support import comes_true

from pairclf.approaches.protocol import Assignment, Loaded
from pairclf.inference import pool as crew
from pairclf.inference import worker
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.rehearsal import faults
from pairclf.rehearsal.faults import CELLS, FAULTS, InjectedFault
from pairclf.rehearsal.mounts import Mount
from pairclf.scores.metrics import Floats
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
def test_hooks_are_python_and_every_fault_says_what_must_come(fault: InjectedFault) -> None:
    assert (fault.expected == "first cell fails") == bool(fault.error_pattern)
    if fault.hook:
        assert fault.markers or fault.skips_waits
        compile(fault.module(0.75, seconds=1.5), "hook", "exec")
    compile(fault.prelude, "prelude", "exec")


class Scores:
    """A pass of the model that the hooks of faults change: it is over at once."""

    def launch(self, items: Sequence[Item]) -> str:
        return "launched"

    def collect(self, items: Sequence[Item], launched: str) -> tuple[Floats, int]:
        return np.zeros((len(items), 3)), 0

    def recover(self) -> None:
        """Nothing is held."""


ASSIGNMENT = Assignment(Path(), None, (), ("cpu",), 1, LargestPass(10, 100, 2), 1)


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """`hook("oom")` changes pairclf's modules in this process as that fault does it in a kernel's."""

    def change(name: str) -> dict[str, Any]:
        monkeypatch.setenv("HOME", str(tmp_path))
        for clock in ("time", "monotonic", "perf_counter"):  # `rule` replaces them
            monkeypatch.setattr(time, clock, getattr(time, clock))
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
        monkeypatch.setattr(worker, "load_bundle", lambda assignment: Loaded(Scores(), "packed", "a test's"))
        monkeypatch.setattr(crew.ProcessPool, "wait", lambda self, seconds: [])
        names: dict[str, Any] = {}
        exec(FAULTS[name].module(0.5, seconds=1e6), names)
        for module, change in names["CHANGES"].items():
            change(sys.modules[module])
        return names

    return change


def items(*lengths: int) -> list[Item]:
    return [Item(row, 0, np.zeros(length, np.int32)) for row, length in enumerate(lengths)]


def test_oom_strikes_passes_over_its_size_alone(hook: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    hook("oom")
    scorer = worker.load_bundle(ASSIGNMENT).scorer
    assert scorer.launch(items(2, 3)) == "launched"
    assert not (tmp_path / "struck-pass").exists()
    with pytest.raises(MemoryError, match="a pass of 6 tokens"):
        scorer.launch(items(3, 3))
    assert (tmp_path / "struck-pass").exists()


def test_slow_passes_last_on_a_clock_that_their_waiter_turns(
    hook: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    clock = hook("slow")["CLOCK"]
    scorer = worker.load_bundle(ASSIGNMENT).scorer
    thread = Thread(target=scorer.launch, args=[items(2, 3)], daemon=True)
    thread.start()
    assert comes_true(lambda: (tmp_path / "struck-pass").exists())
    while thread.is_alive() and clock.ahead < 1e7:
        crew.ProcessPool.wait(None, 1e6)  # type: ignore[arg-type]
    thread.join()
    assert clock.ahead == pytest.approx(2e6, rel=0.01), "1e6 s for each sequence"
