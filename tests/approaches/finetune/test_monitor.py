"""What is written down of a training: the log's figures, the trackers', and signals that come in pairs."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tests_support import make_rows

from pairclf.approaches.finetune import monitor as module
from pairclf.approaches.finetune.distributed import make_accelerator
from pairclf.approaches.finetune.monitor import TrainingLog, check_trackers
from pairclf.approaches.finetune.step import StepResult, make_examples
from pairclf.approaches.finetune.train import train
from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, PairclfError
from pairclf.model.cost import Cost
from pairclf.model.inputs import open_inputs
from pairclf.signals import HASTE, signals

COST = Cost(linear=10.0, quadratic=0.0, trained=0.0, reached=1.0, layers=1)
OUTCOME = StepResult(loss=1.0, tokens=80, computed=100, stop_requested=False)


def log_of(folder: Path, accelerator: Accelerator, every: int = 2) -> TrainingLog:
    return TrainingLog(folder / "metrics.jsonl", every, accelerator, COST)


def test_log_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    """`--resume` in a stranger's run folder would empty the file that the link leads to."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to("mine")
    log = log_of(tmp_path, make_accelerator(resolve({})))
    for call in (lambda: log.begin({}), lambda: log.write({"step": 1})):
        with pytest.raises(PairclfError, match=r"metrics\.jsonl is a link"):
            call()
    assert (tmp_path / "mine").read_text() == "precious"


def test_log_lines_have_means_and_sums_since_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = make_accelerator(resolve({}))
    clock = iter([0.0, 2.0, 5.0, 7.0, 9.0, 13.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "peak_of", lambda _: 4000.0)
    log = log_of(tmp_path, accelerator)
    log.begin({})
    log.start()
    log.add(1, replace(OUTCOME, loss=float("nan")), [80], learning_rate=0.5, skipped=1)
    log.start()
    log.add(2, OUTCOME, [80], learning_rate=0.25, skipped=1)
    log.start()
    log.add(3, replace(OUTCOME, loss=3.0, computed=80), [80], learning_rate=0.1, skipped=1)
    log.close(3)
    log.close(3)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == 1.0
    assert (first["step"], first["learning_rate"], first["skipped"]) == (2, 0.25, 1)
    assert (first["tokens"], first["seconds"], first["tokens_per_second"]) == (160, 4.0, 40.0)
    assert first["padding"] == pytest.approx(0.2)
    # 80 tokens x 10 operations, forward and backward, in each of two steps, in 4 seconds, of 4,000 a second
    assert first["mfu"] == pytest.approx(2 * 2 * 800 / 4 / 4000)
    assert (second["loss"], second["tokens"], second["seconds"], second["padding"]) == (3.0, 240, 8.0, 0.0)
    assert "1 skipped" in log.note


def test_check_trackers_refuses_one_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would leave it out and say nothing."""
    config = resolve({"train": {"report_to": ["wandb"]}})
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(config)


def trained(config_for: Callable[..., Config], folder: Path, tracker: str) -> None:
    config = config_for("llama", train={"report_to": [tracker], "logging_steps": 1})
    rows = make_rows(24)
    examples = make_examples(rows, open_inputs(config).builder.encode(rows), config)
    train(config, examples, folder, make_accelerator(config))


def test_train_gives_tensorboard_its_lines_and_settings_and_says_how_right_the_forecast_was(
    config_for: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(config_for, tmp_path / "fold0", "tensorboard")
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"\d+ rows? (is|are) cut to inputs\.max_length=160 \(\d+%\)", said)
    assert "24 rows x 1 epoch / 8 rows a step = 3 steps" in said
    assert "fit check: predicted" in said
    events: Any = accumulator.EventAccumulator(str(tmp_path / "fold0" / "pairclf"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert {"loss", "tokens_per_second", "learning_rate"} <= set(events.Tags()["scalars"])
    assert "train.learning_rate: 0.01" in next((tmp_path / "fold0").rglob("hparams.yml")).read_text()


def test_a_training_that_would_take_too_long_is_refused_before_its_first_step(
    config_for: Callable[..., Config], tmp_path: Path
) -> None:
    config, rows = config_for("llama", train={"max_hours": 0}), make_rows(8)
    examples = make_examples(rows, open_inputs(config).builder.encode(rows), config)
    with pytest.raises(ConfigError, match=r"the fit check expects \S+ hours .* train\.max_hours=0\n"):
        train(config, examples, tmp_path / "fold0", make_accelerator(config))
    assert not (tmp_path / "fold0" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_train_gives_other_trackers_its_lines_offline(
    config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(tracker)  # now: trackio reads its folder when it is imported
    trained(config_for, tmp_path / "fold0", tracker)
    left = {
        "wandb": "fold0/wandb/offline-run-*/*.wandb",
        "mlflow": "mlruns/*/*/metrics/loss",
        "trackio": "trackio/*.db",
    }
    assert list(tmp_path.glob(left[tracker]))


def test_signals_of_a_launcher_and_a_terminal_are_one() -> None:
    with signals(clock=lambda: 7.0) as caught:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert caught.received is not None


def test_signals_let_a_second_ctrl_c_interrupt() -> None:
    times = iter([7.0, 7.0 + 1.01 * HASTE])
    with pytest.raises(KeyboardInterrupt), signals(clock=lambda: next(times)) as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_signals_that_were_ignored_stay_ignored(ignored: signal.Signals) -> None:
    """`nohup pairclf train ... &`: neither the closed terminal nor a Ctrl-C for another command ends it."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with signals() as caught:
            os.kill(os.getpid(), ignored)
            assert not caught.asked()
            other = signal.SIGTERM if ignored != signal.SIGTERM else signal.SIGINT
            os.kill(os.getpid(), other)
            assert caught.received == other
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)
