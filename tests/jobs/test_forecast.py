"""The forecast conducts a simulated run: more rows take longer, more time buys more, and a table says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pairclf.config import dump_config, load_config, resolve
from pairclf.data.arena import generate, write_lmsys
from pairclf.errors import ConfigError, ModelError
from pairclf.inference.backlog import Inputs
from pairclf.inference.members import open_ensemble
from pairclf.inference.profiles import PROFILES, Profile
from pairclf.jobs import forecast as job
from pairclf.jobs.fit import fit
from pairclf.jobs.forecast import World, _bought, _profiled, _stretched, forecast


@pytest.fixture(scope="module")
def bundle(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; its run's test file is `test.csv` three folders up."""
    folder = tmp_path_factory.mktemp("forecast")
    write_lmsys(generate(40, seed=1), folder, n_test=20)
    config = resolve(
        {
            "output": str(folder / "run"),
            "data": {"folder": str(folder), "train": ["train.csv"]},
            "inputs": {"max_length": 128},
            "model": {"base": str(base_of("llama")), "quantization": "none", "lora": {"rank": 2}},
            "train": {"max_steps": 1},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config))
    return fit(load_config(folder / "config.yaml"), None)


def inputs(rows: int, orders: int = 2) -> Inputs:
    lengths = np.random.default_rng(0).integers(40, 900, rows)
    flat = np.arange(rows * orders).reshape(rows, orders)
    return Inputs(np.stack([lengths] * orders, axis=1), lengths // 4, flat)


@pytest.fixture
def seconds(bundle: Path) -> Callable[..., job.Bought]:
    """What a run on a slow device takes, or gets done."""
    ensemble = open_ensemble([bundle], None, [])

    def run(device: str = "t4x2", rows: int = 2000, limit: float = float("inf")) -> job.Bought:
        slow = PROFILES[device]
        world: World = _profiled(ensemble, Profile(**{n: getattr(slow, n) for n in slow.__slots__} | {"flops": 1e9}))
        return _bought(ensemble, world, [_stretched(inputs(300), rows)], limit)

    return run


def test_time_grows_with_rows_and_shrinks_with_devices(seconds: Callable[..., job.Bought]) -> None:
    load = 10.0
    one, ten, alone = seconds(), seconds(rows=20_000), seconds("t4")
    assert (ten.used - load) / (one.used - load) == pytest.approx(10, rel=0.05)
    assert (alone.used - load) / (one.used - load) == pytest.approx(2, rel=0.05)


def test_more_time_buys_more(seconds: Callable[..., job.Bought]) -> None:
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
def test_rows_stand_for_as_many_as_there_will_be(there: int, rows: int) -> None:
    one, times = _stretched(inputs(there), rows)
    assert round(times * len(one.shared)) == rows
    assert len(one.shared) <= job.SIMULATED
    assert (one.twin == np.arange(one.twin.size).reshape(one.twin.shape)).all()  # others, though of equal length


def test_repeated_rows_stay_repeated() -> None:
    plain = inputs(4)
    plain.twin[2] = plain.twin[0]
    one, _ = _stretched(plain, 4)
    assert one.twin.tolist() == plain.twin.tolist()


def test_the_tables_say_hours_and_deadlines(bundle: Path) -> None:
    data = bundle.parents[2] / "test.csv"
    tables = forecast([bundle], data, device="t4x2", rows=25_000, deadlines=[15.0, 3600.0])
    console = Console(width=200)
    with console.capture() as shown:
        console.print(*tables)
    assert "Forecast of 25,000 rows" in shown.get()
    assert "60 min" in shown.get() or "1 h 00 min" in shown.get()


def test_this_machine_is_measured(bundle: Path) -> None:
    tables = forecast([bundle], bundle.parents[2] / "test.csv", device="here", deadlines=[3600.0])
    assert len(tables) == 2


def test_a_model_that_does_not_fit_and_a_device_that_nobody_knows(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--device t5"):
        forecast([bundle], bundle.parents[2] / "test.csv", device="t5")
    monkeypatch.setattr(job, "model_bytes", lambda *arguments: 40 << 30)
    with pytest.raises(ModelError, match="40"):
        forecast([bundle], bundle.parents[2] / "test.csv", device="t4x2")
