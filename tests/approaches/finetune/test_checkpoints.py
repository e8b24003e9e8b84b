"""Going on: whatever killed a training, and whenever, its continuation ends in the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clocks_support import comes_true
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.forked import command, forked
from support.training import log_lines, weights
from tests_support import make_rows, write_csv

from pairclf.approaches.finetune import checkpoints as module
from pairclf.approaches.finetune import train as loop
from pairclf.approaches.finetune.checkpoints import CHECKPOINTS, STATE, check_disk, flattened, unflattened
from pairclf.approaches.finetune.distributed import make_accelerator
from pairclf.approaches.finetune.monitor import estimate_resources
from pairclf.approaches.finetune.step import HeldOut, make_examples
from pairclf.approaches.finetune.train import train
from pairclf.config import Config
from pairclf.config.dump import flat_settings
from pairclf.errors import CheckpointError, StopError
from pairclf.model.engine import Classifier
from pairclf.model.inputs import open_inputs
from pairclf.scores.figures import Metric
from pairclf.scores.intervals import mean_of

ROWS = make_rows(12)
pytestmark = pytest.mark.usefixtures("without_forecast")
ADAPTER = "fold0/bundle/adapter/adapter_model.safetensors"


def run(config: Config, folder: Path, resume: bool | None = None) -> Classifier:
    encoded = open_inputs(config).builder.encode(ROWS)
    targets = torch.tensor([row.target for row in ROWS[:6]]).numpy()
    held_out = HeldOut(encoded[:6], targets, np.ones(6), "")
    accelerator = make_accelerator(config)
    examples = make_examples(ROWS, encoded, config)
    return train(config, examples, folder, accelerator, held_out=held_out, resume=resume).classifier


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock or the memory says."""
    measured = {"seconds", "tokens_per_second", "memory_gb", "mfu"}
    return [{name: value for name, value in line.items() if name not in measured} for line in log_lines(folder)]


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when it has taken this step."""
    taken, original = [0], loop.optimizer_step

    def apply(*arguments: Any) -> Any:
        if taken[0] == step:
            raise Killed
        taken[0] += 1
        return original(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", apply)


def run_killed(
    config: Config, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch, resume: bool | None = None
) -> None:
    """A training that dies when it has taken this step."""
    with monkeypatch.context() as patch:
        kill_after(step, patch)
        with pytest.raises(Killed):
            run(config, folder, resume)


# 9 steps, dropout on, checkpoints at 2, 4, 6, 8 and 9: more than one between two lines of the log.
DIALS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw8bit": {"optim": "adamw_8bit", "average_checkpoints": 3, "save_total_limit": 3},
    "adafactor": {"optim": "adafactor"},
    "random order": {"swap": "random", "ema_decay": 0.9, "eval_steps": 2, "keep_weights": "best"},
}


def config_of(config_for: Callable[..., Config], **train: Any) -> Config:
    steps = {"global_batch_size": 4, "num_train_epochs": 3, "save_steps": 2, "logging_steps": 3}
    settings = {**steps, "learning_rate": 1e-3, **train}
    return config_for("llama", model={"lora": {"r": 64, "lora_dropout": 0.3}}, train=settings)


@pytest.fixture(scope="module")
def undisturbed(config_for: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights that `config_of(config_for)` ends in."""
    return weights(run(config_of(config_for), tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name == "adafactor")) for name in DIALS]
)
def test_train_killed_goes_on_to_the_same_weights_and_log(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = config_of(config_for, **DIALS[name])
    undisturbed = weights(run(config, tmp_path / "whole"))
    for step in (5, 3):  # killed, killed again soon after it went on
        run_killed(config, tmp_path / "killed", step, monkeypatch, resume=True)
    assert torch.equal(weights(run(config, tmp_path / "killed", resume=True)), undisturbed)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_train_resumed_with_other_seeds_of_dropout_would_show(
    config_for: Callable[..., Config], undisturbed: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong variant: random numbers that go on where the process happens to be."""
    config = config_of(config_for)
    run_killed(config, tmp_path / "killed", 5, monkeypatch)
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed(7))
    assert not torch.equal(weights(run(config, tmp_path / "killed", resume=True)), undisturbed)


@pytest.mark.parametrize("at", ["weights", "optimizer", "rename", "rotation"])
def test_train_killed_while_it_saves_goes_on_from_a_whole_checkpoint(
    config_for: Callable[..., Config],
    undisturbed: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    config = config_of(config_for)
    folder = tmp_path / "killed"

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if at in Path(path).name and (folder / CHECKPOINTS / "step-00000004").exists():
            Path(path).write_bytes(b"half")
            raise Killed
        original(tensors, path)

    def replace(source: Path, target: Path) -> None:
        if at == "rename" and Path(target).name == "step-00000006":
            raise Killed
        renamed(source, target)

    def rmtree(path: Path, **options: Any) -> None:
        if at == "rotation" and Path(path).name == "step-00000002":
            raise Killed
        removed(path, **options)

    original, renamed, removed = module.save_file, os.replace, shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", save_file)
        patch.setattr(os, "replace", replace)
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            run(config, folder)
    found = sorted(path.parent.name for path in (folder / CHECKPOINTS).glob(f"step-*/{STATE}"))
    assert found == (["step-00000004", "step-00000006"] if at == "rotation" else ["step-00000002", "step-00000004"])
    assert torch.equal(weights(run(config, folder, resume=True)), undisturbed)
    left = sorted(path.name for path in (folder / CHECKPOINTS).iterdir())
    assert left == ["step-00000008", "step-00000009"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O: No space left")], ids=repr
)
def test_train_on_a_full_disk_stops_and_spares_the_checkpoints(
    config_for: Callable[..., Config],
    undisturbed: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    config, original = config_of(config_for), module.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if (tmp_path / "full" / CHECKPOINTS / "step-00000004").exists():
            raise error
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", save_file)
        with pytest.raises(CheckpointError, match=r"can't be written: .*No space left") as caught:
            run(config, tmp_path / "full")
    assert "--resume" in str(caught.value)
    assert torch.equal(weights(run(config, tmp_path / "full", resume=True)), undisturbed)


def test_train_looks_at_the_disk_before_the_first_step(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"need 1000000\.0 GB"):
        check_disk(tmp_path / "not" / "yet", 10**15)
    monkeypatch.setattr(loop, "estimate_resources", estimate_resources)  # the bytes are its estimate
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="checkpoints and bundle need"):
        run(config_of(config_for), tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


def test_train_does_not_overwrite_what_stopped_half_way_unasked(
    config_for: Callable[..., Config], undisturbed: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(config_for)
    run_killed(config, tmp_path, 5, monkeypatch)
    with pytest.raises(CheckpointError, match="checkpoints of an unfinished training"):
        run(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"train.learning_rate=0.5 \(was 0.001\)"):
        run(config_of(config_for, learning_rate=0.5), tmp_path, resume=True)
    other = config.model_copy(update={"train": config.train.model_copy(update={"label_smoothing_factor": 0.1})})
    with pytest.raises(CheckpointError, match="label_smoothing_factor"):
        run(other, tmp_path, resume=True)
    again = run(
        config_of(config_for, per_device_train_batch_size=2, logging_steps=1), tmp_path, resume=True
    )  # these are free
    assert torch.allclose(weights(again), undisturbed, atol=1e-2)
    run(config_of(config_for, learning_rate=0.5), tmp_path, resume=False)


def test_restore_names_a_damaged_checkpoint(
    config_for: Callable[..., Config], undisturbed: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(config_for)
    run_killed(config, tmp_path, 5, monkeypatch)
    newest = tmp_path / CHECKPOINTS / "step-00000004"
    (newest / "optimizer.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    with pytest.raises(CheckpointError, match="damaged"):
        run(config, tmp_path, resume=True)
    shutil.rmtree(newest)  # as the message says
    assert torch.equal(weights(run(config, tmp_path, resume=True)), undisturbed)


def test_train_saves_and_ends_on_a_signal_and_goes_on(
    config_for: Callable[..., Config], undisturbed: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(config_for, save_steps=None)
    original, handler = loop.optimizer_step, signal.getsignal(signal.SIGTERM)

    def apply(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", apply)
        with pytest.raises(StopError, match="SIGTERM after step 2 of 9") as caught:
            run(config, tmp_path / "stopped")
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.equal(weights(run(config, tmp_path / "stopped", resume=True)), undisturbed)


def test_train_mean_of_checkpoints_does_not_depend_on_signals(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(config_for, save_steps=3, average_checkpoints=2)
    undisturbed = weights(run(config, tmp_path / "whole"))
    original, step = loop.optimizer_step, [0]

    def apply(*arguments: Any) -> Any:
        step[0] += 1
        if step[0] in (3, 6):  # the signal is heeded one step later
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", apply)
        for heeded in (4, 7):
            with pytest.raises(StopError, match=f"after step {heeded} of 9"):
                run(config, tmp_path / "stopped", resume=True)
            step[0] = heeded
    assert torch.equal(weights(run(config, tmp_path / "stopped", resume=True)), undisturbed)
    with pytest.raises(CheckpointError, match="save_steps"):
        run(config_of(config_for, save_steps=1, average_checkpoints=2), tmp_path / "stopped", resume=True)


def test_train_keeps_best_weights_once_a_checkpoint_and_misses_them_at_once(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(config_for, eval_steps=1, keep_weights="best", save_steps=4, logging_steps=99)
    with monkeypatch.context() as patch:
        better = Metric(lambda judged: mean_of(0 * judged.weights - len(list(tmp_path.rglob("best-*")))), "", 1)
        patch.setitem(loop.METRICS, "log_loss", better)
        kill_after(7, patch)
        with pytest.raises(Killed):
            run(config, tmp_path)
    found = sorted(path.name for path in (tmp_path / CHECKPOINTS).glob("best-*"))
    assert 1 <= len(found) <= 3
    for path in (tmp_path / CHECKPOINTS).glob("best-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        run(config, tmp_path, resume=True)


def test_prepare_fingerprint_differs_for_other_texts(config_for: Callable[..., Config]) -> None:
    config = config_of(config_for)
    other = [replace(row, fields={**row.fields, "prompt": ("Question 7",)}) for row in ROWS]
    encoded = open_inputs(config).builder.encode(ROWS)
    assert make_examples(ROWS, encoded, config).fingerprint != make_examples(other, encoded, config).fingerprint


@pytest.mark.parametrize("linked", ["the folder", "a checkpoint"])
def test_checkpoints_that_are_links_are_not_read_or_deleted(tmp_path: Path, linked: str) -> None:
    """A stranger's run folder may lead to another run's."""
    other, folder = tmp_path / "other" / "step-00000001", tmp_path / "run" / "checkpoints"
    other.mkdir(parents=True)
    (other / STATE).write_text("{}")
    if linked == "the folder":
        folder.parent.mkdir()
        folder.symlink_to(other.parent)
    else:
        folder.mkdir(parents=True)
        (folder / other.name).symlink_to(other)
        assert module.Checkpoints(folder, 1, {}).complete() == []
    module.discard(folder)
    assert not folder.is_symlink()
    assert not folder.exists()
    assert (other / STATE).read_text() == "{}"


@pytest.mark.parametrize("harm", ["a pipe", "too deep", "too long", "no object", "no state"])
def test_restore_names_a_state_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    """A stranger's run folder may hold anything; a pipe would be waited for."""
    path = tmp_path / "step-00000001" / STATE
    path.parent.mkdir()
    monkeypatch.setattr(module, "MAX_JSON", 1 << 20)
    texts = {"too deep": "[" * 200_000, "too long": " " * (2 << 20), "no object": "[]"}
    if harm == "a pipe":
        os.mkfifo(path)
    else:
        identity: dict[str, Any] = {}
        path.write_text(texts.get(harm, json.dumps({"format": module.FORMAT, "identity": identity, "state": "x"})))
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        module.Checkpoints(tmp_path, 1, {}).restore(SimpleNamespace(engine=False))  # type: ignore[arg-type]


def test_delete_old_spares_folders_of_others(tmp_path: Path) -> None:
    """The folder may be a link, and a stranger's choice what it leads to."""
    names = ["step-1-of-my-thesis", "step-notes", ".tmp-step-mine", "step-00000007.zip"]
    ours = ["step-00000001", "step-00000002-stopped", ".tmp-step-00000003-0123abcd", "step-00000004"]
    for name in (*names, *ours):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000004" / STATE).write_text("{}")
    module.Checkpoints(tmp_path, 1, {})._delete_old()
    assert {path.name for path in tmp_path.iterdir()} == {*names, "step-00000004"}


def test_train_resumed_without_a_checkpoint_starts_from_the_beginning(
    config_for: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config_of(config_for), tmp_path, resume=True)
    assert "training starts at step 1" in " ".join(capsys.readouterr().err.split())


TREES = st.recursive(
    st.integers(-5, 5) | st.none() | st.booleans() | st.text(max_size=3) | st.integers(0, 3).map(torch.zeros),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.integers(0, 9) | st.text(max_size=3), below, max_size=3)
    ),
    max_leaves=8,
)


@given(TREES)
def test_unflattened_gives_back_what_flattened_took(tree: Any) -> None:
    tensors, rest = flattened(tree)
    back = unflattened(tensors, json.loads(json.dumps(rest)))
    assert repr(back) == repr(tree)


def test_flat_settings_have_dotted_names() -> None:
    flat = flat_settings(Config())
    assert flat["train.max_grad_norm"] == 1.0
    assert flat["train.adam_betas"] == [0.9, 0.999]
    assert not [name for name in flat if name.startswith("classical.")]


def latest(folder: Path) -> int:
    """Step of the newest checkpoint; 0: there is none."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("step-*")), default=0)


@pytest.mark.thorough
@pytest.mark.slow
def test_train_killed_at_any_moment_leads_to_the_same_bundle(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole command in a process of its own, killed at random moments until it comes to its end."""
    write_csv(tmp_path / "train.csv", make_rows(40))
    tree = {
        "data": {"train": str(tmp_path / "train.csv")},
        "folds": {"n_splits": 2},
        "inputs": {"max_length": 160, "num_proc": 1},
        "model": {"base": str(base_of("llama")), "quantization": "none", "lora": {"r": 4, "lora_dropout": 0.2}},
        "train": {
            "global_batch_size": 2,
            "num_train_epochs": 8,
            "save_steps": 1,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
        },
    }
    path = tmp_path / "killed.yaml"
    path.write_text(json.dumps(tree))

    def started(name: str, *more: str) -> BaseProcess:
        arguments = ["train", str(path), "--fold", "0", f"output_dir={tmp_path / name}", *more]
        return forked(command, *arguments, output=tmp_path / "output")

    started("whole").join()
    draw, killed = random.Random(0), 0
    for _ in range(40):
        process, folder = started("killed", "--resume"), tmp_path / "killed" / "fold0" / CHECKPOINTS
        enough = latest(folder) + draw.randint(1, 12)
        assert comes_true(lambda: not process.is_alive() or latest(folder) >= enough)  # noqa: B023
        if killed < 3:
            process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert killed == 3
    whole, again = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "killed"))
    assert all(torch.equal(one, again[name]) for name, one in whole.items())
    assert not (tmp_path / "killed" / "fold0" / CHECKPOINTS).exists()
