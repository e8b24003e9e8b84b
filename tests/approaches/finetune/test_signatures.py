"""An engine's checkpoint is made of pickles: a stranger's is not loaded, and runs nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pairclf.approaches.finetune.checkpoints import ENGINE, STATE, Checkpoints, TrainingProgress
from pairclf.approaches.finetune.signatures import is_signed, key_path, signature
from pairclf.errors import CheckpointError


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


class Engine:
    """Saves and loads as DeepSpeed does: with pickle, whatever lies there."""

    is_main_process, process_index, num_processes, scaler = True, 0, 1, None

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    def wait_for_everyone(self) -> None: ...
    def save_state(self, folder: str, *, safe_serialization: bool) -> None:
        (Path(folder) / "pytorch_model").mkdir(parents=True)
        (Path(folder) / "pytorch_model" / "states.pt").write_bytes(pickle.dumps({"step": 3}))

    def load_state(self, folder: str) -> None:
        self.loaded += [pickle.loads(path.read_bytes()) for path in sorted(Path(folder).rglob("*.pt"))]


Restore = Callable[..., list[Any]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of one step, which this user wrote."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    learner: Any = SimpleNamespace(engine=True, accelerator=Engine(), average=None)
    Checkpoints(tmp_path / "checkpoints", 1, {}).save(TrainingProgress(step=3), learner, due=True)
    return tmp_path / "checkpoints"


def restore(folder: Path, *, trusted: bool = False) -> list[Any]:
    settings = SimpleNamespace(train=SimpleNamespace(keep_weights="last"))
    learner: Any = SimpleNamespace(engine=True, accelerator=Engine(), average=None, config=settings)
    state = Checkpoints(folder, 1, {}, trusted=trusted).restore(learner)
    assert state is not None
    assert state.step == 3
    return list(learner.accelerator.loaded)


def test_ones_own_is_loaded_also_from_another_place(folder: Path, tmp_path: Path) -> None:
    assert restore(folder) == [{"step": 3}]
    shutil.copytree(folder, tmp_path / "copied")
    assert restore(tmp_path / "copied") == [{"step": 3}]
    assert key_path().stat().st_mode & 0o777 == 0o600
    assert not key_path().is_relative_to(folder)


def changed(engine: Path, canary: Path) -> None:
    (engine / "pytorch_model" / "states.pt").write_bytes(pickle.dumps(Canary(canary)))


def added(engine: Path, canary: Path) -> None:
    (engine / "more.pt").write_bytes(pickle.dumps(Canary(canary)))


def linked_file(engine: Path, canary: Path) -> None:
    (engine.parent / "elsewhere").write_bytes(pickle.dumps(Canary(canary)))
    (engine / "more.pt").symlink_to(engine.parent / "elsewhere")


def linked_folder(engine: Path, canary: Path) -> None:
    (engine.parent / "elsewhere").mkdir()
    added(engine.parent / "elsewhere", canary)
    (engine / "more").symlink_to(engine.parent / "elsewhere")


def renamed(engine: Path, canary: Path) -> None:
    (engine / "pytorch_model" / "states.pt").rename(engine / "pytorch_model" / "other.pt")


def unsigned(engine: Path, canary: Path) -> None:
    changed(engine, canary)
    state = engine.parent / STATE
    state.write_text(state.read_text().replace('"engine": "', '"engine": null, "was": "'))


def signed_by_a_stranger(engine: Path, canary: Path) -> None:
    key_path().write_bytes(bytes(32))


def without_a_key(engine: Path, canary: Path) -> None:
    key_path().unlink()


@pytest.mark.parametrize(
    "spoil", [changed, added, linked_file, linked_folder, renamed, unsigned, signed_by_a_stranger, without_a_key]
)
def test_a_strangers_is_refused_and_runs_nothing(
    folder: Path, tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    spoil(next(folder.glob("step-*")) / ENGINE, tmp_path / "ran")
    with pytest.raises(CheckpointError, match="not written by this user") as refused:
        restore(folder)
    assert "--trust-checkpoint" in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_whoever_trusts_it_says_so_and_it_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The canary does run then: without the check, it would have run above."""
    changed(next(folder.glob("step-*")) / ENGINE, tmp_path / "ran")
    restore(folder, trusted=True)
    assert (tmp_path / "ran").exists()
    assert "can run any code" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("mode", "content"), [(0o640, bytes(32)), (0o602, bytes(32)), (0o600, b"short")])
def test_a_key_that_others_know_is_none(folder: Path, mode: int, content: bytes) -> None:
    key_path().write_bytes(content)
    key_path().chmod(mode)
    with pytest.raises(CheckpointError, match="the key of checkpoints"):
        restore(folder)


def test_a_home_that_can_not_be_written_to_costs_the_signature_and_not_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert signature({"a": "b"}) is None
    assert "not signed" in capsys.readouterr().err
    assert not is_signed({"a": "b"}, None)
