"""What a prediction imports before its first pass, and where: torch in the server of the workers, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
from clocks_support import PATIENCE
from support.runs import random_bundle, run_config
from tests_support import make_rows, write_csv

from pairclf.approaches import approach_of
from pairclf.errors import ModelError
from pairclf.inference import prepare
from pairclf.inference.ensemble import open_ensemble
from pairclf.inference.pool import PRELOADING, forked, main, warm_up
from pairclf.trust import Trust, granted

UNTIL_THE_FIRST_PASS = """
import sys
from pathlib import Path
from pairclf.approaches.protocol import ModelCost
from pairclf.inference import predict, prepare

servers, asked = [], []

def warm_up(modules):
    servers.append(sorted(modules))
    return True

def forked(function, models, trust):
    asked.append(function.__name__)
    return [ModelCost(1.0, 0.0, 1, {"cpu": 1.0}) for _ in models]

class NoWorkers(Exception):
    pass

def no_workers(models, groups, clock):
    raise NoWorkers([len(one.encoded) for one in models])

prepare.warm_up, prepare.forked, predict.ProcessPool = warm_up, forked, no_workers
try:
    predict.predict([Path("bundle")], Path("test.csv"), Path("submission.csv"))
except NoWorkers as reached:
    print("rows", reached)
print("server", *servers[0], len(servers), "asked", *asked)
print("loaded", [name for name in ("torch", "transformers", "peft", "datasets", "pandas") if name in sys.modules])
"""


@pytest.fixture
def bundle(base_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return random_bundle(tmp_path / "bundle", run_config(tmp_path, base_of("llama")))


def test_main_process_of_a_prediction_imports_no_torch(bundle: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", make_rows(3))
    command = [sys.executable, "-c", UNTIL_THE_FIRST_PASS]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-3:] == [
        "rows [3]",
        "server pairclf.approaches.torch_models 2 asked _costs",
        "loaded []",
    ]


def test_costs_are_the_same_from_the_process_that_the_server_forks(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = open_ensemble([bundle], None, ()).members
    approach = approach_of(members[0].bundle.config)
    here = [approach.cost(member.bundle, member.base) for member in members]
    assert prepare.costs_of(members) == here
    monkeypatch.delitem(sys.modules, approach.module)
    asked: list[object] = []
    monkeypatch.setattr(prepare, "warm_up", lambda modules: True)
    monkeypatch.setattr(prepare, "forked", lambda *call: (asked.append(call), forked(*call))[1])
    assert prepare.costs_of(members) == here
    assert len(asked) == 1
    assert approach.module not in sys.modules


def test_costs_are_counted_here_if_that_process_is_killed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = open_ensemble([bundle], None, ()).members
    approach = approach_of(members[0].bundle.config)
    here = [approach.cost(member.bundle, member.base) for member in members]
    monkeypatch.delitem(sys.modules, approach.module)
    monkeypatch.setattr(prepare, "warm_up", lambda modules: True)
    monkeypatch.setattr(prepare, "forked", lambda *call: forked(_die))
    assert prepare.costs_of(members) == here


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ORPHAN = """
from pairclf.inference.pool import forked, warm_up

warm_up([])
forked(exec, "import time; print('begun', flush=True); time.sleep(120)")
"""


def test_nothing_is_left_of_a_forked_process_whose_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        parent.communicate(timeout=PATIENCE)  # until nobody is left who could write, nor the server


def _raise(trust: Trust) -> None:
    raise ModelError(f"{granted() == trust} {os.getpid()}", remedy="none")


def test_errors_of_the_forked_process_are_raised_here() -> None:
    with pytest.raises(ModelError, match=r"True \d+") as raised:
        forked(_raise, granted())
    assert str(os.getpid()) not in str(raised.value)


def test_server_imports_the_switch_of_the_collector_first(monkeypatch: pytest.MonkeyPatch) -> None:
    server = forkserver._forkserver  # type: ignore[attr-defined]
    monkeypatch.setattr(server, "_preload_modules", [])
    monkeypatch.setattr(forkserver, "ensure_running", lambda: None)
    assert warm_up(["one", "two"])
    assert server._preload_modules == [PRELOADING, main.__module__, "one", "two"]


COLLECTOR = """
import gc, os
import pairclf.inference.preloading
print(gc.isenabled(), gc.get_freeze_count(), flush=True)
if os.fork():
    os.wait()
else:
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""


def test_workers_collect_garbage_and_leave_alone_what_was_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", COLLECTOR], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["False 0", "True True"]
