"""The forecast conducts a simulated run: more rows take longer, more time buys more, and a table says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.runs import random_bundle, run_config

from pairclf.approaches.protocol import ModelCost
from pairclf.bundles.bundle import open_bundle
from pairclf.config import resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import ConfigError, ModelError
from pairclf.hardware import PROFILES, Profile
from pairclf.inference import forecast as job
from pairclf.inference.ensemble import open_ensemble
from pairclf.inference.forecast import (
    ORDERS_HINT,
    SimulationSetup,
    _resized_index,
    _setup_of_profile,
    _simulate,
    forecast,
)
from pairclf.inputs.sequences import SequenceIndex
from pairclf.runs.fit import fit


@pytest.fixture(scope="module")
def bundle(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; its run's test file is `test.csv` three folders up."""
    folder = tmp_path_factory.mktemp("forecast")
    write_lmsys(generate(40, seed=1), folder, n_test=20)
    return random_bundle(folder / "run" / "all" / "bundle", run_config(folder, base_of("llama")))


def inputs(rows: int, orders: int = 2) -> SequenceIndex:
    lengths = np.random.default_rng(0).integers(40, 900, rows)
    flat = np.arange(rows * orders).reshape(rows, orders)
    return SequenceIndex(np.stack([lengths] * orders, axis=1), lengths // 4, flat)


@pytest.fixture
def seconds(bundle: Path) -> Callable[..., job.DeadlineResult]:
    """What a run on a slow device takes, or gets done."""
    ensemble = open_ensemble([bundle], None, [])

    def run(device: str = "t4x2", rows: int = 2000, limit: float = float("inf")) -> job.DeadlineResult:
        slow = PROFILES[device]
        world: SimulationSetup = _setup_of_profile(
            ensemble, Profile(**{n: getattr(slow, n) for n in slow.__slots__} | {"flops": 1e9})
        )
        return _simulate(ensemble, world, [_resized_index(inputs(300), rows)], limit)

    return run


def test_bought_time_grows_with_rows_and_shrinks_with_devices(seconds: Callable[..., job.DeadlineResult]) -> None:
    load = 10.0
    one, ten, alone = seconds(), seconds(rows=20_000), seconds("t4")
    assert (ten.used - load) / (one.used - load) == pytest.approx(10, rel=0.05)
    assert (alone.used - load) / (one.used - load) == pytest.approx(2, rel=0.05)


def test_bought_gain_grows_with_time(seconds: Callable[..., job.DeadlineResult]) -> None:
    whole = seconds()
    bought = [seconds(limit=part * whole.used) for part in (0.3, 0.6, 0.8)]
    assert all(one.used <= one.seconds for one in bought)
    gained = [one.gain for one in (*bought, whole)]
    assert gained == sorted(gained)
    assert gained[0] < gained[-1]
    first, second = whole.scored
    assert bought[1].scored[first] == 1
    assert 0 < bought[1].scored[second] < 1


@given(st.integers(1, 30), st.integers(1, 9000))
def test_stretched_rows_stand_for_as_many_as_there_will_be(there: int, rows: int) -> None:
    one, times = _resized_index(inputs(there), rows)
    assert round(times * len(one.shared)) == rows
    assert len(one.shared) <= job.MAX_SIMULATED_ROWS
    assert (
        one.duplicate_of == np.arange(one.duplicate_of.size).reshape(one.duplicate_of.shape)
    ).all()  # others, though of equal length


def test_stretched_keeps_repeated_rows() -> None:
    plain = inputs(4)
    plain.duplicate_of[2] = plain.duplicate_of[0]
    one, _ = _resized_index(plain, 4)
    assert one.duplicate_of.tolist() == plain.duplicate_of.tolist()


@pytest.mark.parametrize("readout", ["head", "reward"])
def test_forecast_tables_have_hours_deadlines_and_orders(bundle: Path, tmp_path: Path, readout: str) -> None:
    folder = bundle.parents[2]
    if readout == "reward":
        base = open_bundle(bundle).config.model.base
        bundle = random_bundle(tmp_path / "bundle", run_config(folder, base, model={"readout": readout}))
    tables = forecast([bundle], folder / "test.csv", device="t4x2", rows=25_000, deadlines=["15s", "1h"])
    console = Console(width=200)
    with console.capture() as shown:
        console.print(*tables)
    assert "Forecast of 25,000 rows" in shown.get()
    for words in ("in both orders", "together with it", "in one order", ORDERS_HINT):
        assert (words in " ".join(shown.get().split())) == (readout == "head")
    assert "60 min" in shown.get() or "1 h 00 min" in shown.get()


def test_forecast_counts_in_the_units_of_the_approach_and_tells_equal_names_apart(tmp_path: Path) -> None:
    write_lmsys(generate(40, seed=1), tmp_path, n_test=20)
    bundles = []
    for seed in (0, 1):
        sections = {"approach": "classical", "classical": {"n_features": 512}, "folds": {"n_splits": 2}, "seed": seed}
        data = {"folder": str(tmp_path), "train": ["train.csv"]}
        bundles.append(fit(resolve({"output_dir": str(tmp_path / f"{seed}" / "run"), "data": data, **sections}), 0))
    console = Console(width=80)
    with console.capture() as shown:
        console.print(*forecast(bundles, tmp_path / "test.csv", device="t4", deadlines=["20m", "40m", "1h", "2h"]))
    assert re.search(r"^deadline +20 min .* none *$", shown.get(), re.MULTILINE)
    assert shown.get().count("units of 64 characters") == 2
    assert "tokens" not in shown.get()
    assert all(f"\nrun-fold0 (member {number}) AB " in shown.get() for number in (1, 2))


def test_forecast_measures_this_machine(bundle: Path) -> None:
    tables = forecast([bundle], bundle.parents[2] / "test.csv", device="here", deadlines=["1h"])
    assert len(tables) == 2


def test_forecast_refuses_unknown_devices_and_models_that_do_not_fit(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--device t5"):
        forecast([bundle], bundle.parents[2] / "test.csv", device="t5")
    monkeypatch.setattr(job, "costs_of", lambda members: [ModelCost(1.0, 0.0, 40 << 30, {"cpu": 1.0, "cuda": 1.0})])
    with pytest.raises(ModelError, match="40"):
        forecast([bundle], bundle.parents[2] / "test.csv", device="t4x2")
