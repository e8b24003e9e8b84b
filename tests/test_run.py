"""A run has one set of settings, and says so wherever its folds come together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from tests_support import hollow_bundle, hollow_run

from pairclf.approaches.finetune.merge import merge
from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, DataError
from pairclf.inference.ensemble import open_ensemble
from pairclf.run import Paths, bundles_of, training_log
from pairclf.runs.evaluate import evaluate_run


def config_at(run: Path, **train: float) -> Config:
    return resolve({"output_dir": str(run), "folds": {"n_splits": 2}, "train": train})


def predict_from_within(config: Config, out: Path) -> None:
    with chdir(Path(str(config.output_dir), "fold1")):
        open_ensemble([Path("../fold0/bundle"), Path("bundle")], None, [])


JOINED: dict[str, Callable[[Config, Path], object]] = {
    "predict": lambda config, out: open_ensemble(bundles_of(config), None, []),
    "predict from within the run": predict_from_within,
    "merge": lambda config, out: merge(config, out, max_shift=1.0),
    "merge of chosen folds": lambda config, out: merge(config, out, max_shift=1.0, folds=[0, 1]),
    "evaluate": lambda config, out: evaluate_run(config, None),
}


@pytest.mark.parametrize("command", JOINED)
def test_folds_of_different_settings_are_not_joined(command: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_at(run, learning_rate=1e-3)
    hollow_run(run, config, config_at(run, learning_rate=2e-3, logging_steps=7))
    message = "folds 0 and 1 of one run .*: fold 1 with train.learning_rate=0.002 (was 0.001)\n  where: *" + str(run)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        JOINED[command](config, tmp_path / "out")


def test_bundles_of_different_runs_and_settings_that_change_no_weight_may_differ(tmp_path: Path) -> None:
    one = {"learning_rate": 1e-3}
    hollow_run(tmp_path / "a", config_at(tmp_path, **one), config_at(tmp_path, **one, logging_steps=7))
    hollow_run(tmp_path / "b", config_at(tmp_path, learning_rate=2e-3))
    hollow_bundle(tmp_path / "bundle" / "a-1234", config_at(tmp_path, learning_rate=3e-3), "a", fold=0)
    hollow_bundle(tmp_path / "bundle" / "b-1234", config_at(tmp_path, learning_rate=4e-3), "b", fold=1)
    paths = [*sorted(tmp_path.glob("*/fold*/bundle")), *sorted((tmp_path / "bundle").iterdir())]
    assert len(open_ensemble(paths, None, []).members) == 5


def test_runs_are_listed(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("folds: {n_splits: 3}\ntrain: {learning_rate: 1e-3}\n")
    trained = resolve({"folds": {"n_splits": 3}, "train": {"learning_rate": 5e-4}})
    record = {"seconds": 5400, "finished": "2026-01-02T03:04:05+00:00", "config_file": str(file)}
    figures = [{"log_loss": 0.9, "weight": 1.0}, {"log_loss": 1.0, "weight": 3.0}]
    hollow_run(tmp_path / "runs/a/fast", trained, trained, metrics=figures, **record)
    hollow_run(tmp_path / "runs/b", resolve({"folds": {"n_splits": 3}, "train": {"learning_rate": 1e-3}}), **record)
    code, text = cli("runs", tmp_path / "runs")
    assert code == 0
    assert (
        "a/fast 0-1 of 3 log loss 0.9750 3.00 2026-01-02 train.learning_rate=" in text
    )  # where a line ends, is the terminal's
    assert " b 0 of 3 - 1.50 2026-01-02 nothing: as" in text
    file.unlink()
    assert "can't be read" in cli("runs", tmp_path / "runs")[1]
    assert ".. 0 of 3 - 1.50" in cli("runs", tmp_path / "runs/b/fold0")[1]
    hollow_run(tmp_path / "damaged", trained, seconds="long", finished=5, config_file=[])
    assert ". 0 of 3 - - - (its config file is unknown)" in cli("runs", tmp_path / "damaged")[1]


@pytest.mark.parametrize(
    ("tail", "whole"),
    [
        ('{"step": 2, "lo', True),
        ("\0\0\0", True),
        ("", True),
        ('{"step": 2, "lo\n', False),
        ("[" * 100_000 + "\n", False),
    ],
    ids=["killed", "power cut", "whole", "damaged", "deep"],
)
def test_the_log_of_a_killed_training_is_read_as_far_as_it_is_whole(tail: str, whole: bool, tmp_path: Path) -> None:
    paths = Paths(tmp_path, 0)
    assert training_log(paths) == []
    paths.folder.mkdir()
    (paths.folder / "metrics.jsonl").write_text('{"step": 1, "x": "a\u2028b"}\n[1]\n' + tail, encoding="utf-8")
    if whole:
        assert training_log(paths) == [{"step": 1, "x": "a\u2028b"}]
    else:
        with pytest.raises(DataError, match=r"metrics\.jsonl can't be read"):
            training_log(paths)
