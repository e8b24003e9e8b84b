"""The approach `prompt`: its folds, its bundles, and what it shows of other rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from models_support import with_lm_head
from scipy.special import softmax
from sklearn.metrics import log_loss
from tests_support import make_rows, write_csv

from pairclf.approaches import approach_of
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.examples import read_examples
from pairclf.config import Config, override, resolve
from pairclf.data.rows import targets_of, to_rows
from pairclf.errors import BundleError, ConfigError
from pairclf.inputs.examples import pick_examples, with_examples
from pairclf.inspect.lengths import measure
from pairclf.inspect.show import show_rows
from pairclf.model.inputs import open_inputs
from pairclf.run import OOF, Paths, Run, Split
from pairclf.runs.cv import cross_validate
from pairclf.runs.fit import fit
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import mean_of_orders

WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}


@pytest.fixture(scope="module")
def config(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("prompt")
    base = with_lm_head(base_of("llama"), folder / "base", tied=True, initializer_range=0.3)
    write_csv(folder / "train.csv", make_rows(16))
    tree: dict[str, Any] = {
        "approach": "prompt",
        "output_dir": str(folder / "run"),
        "data": {"folder": str(folder), "train": "train.csv"},
        "folds": {"n_splits": 2, "near_duplicate_threshold": None},
        "inputs": {"max_length": 640, "num_proc": 1},
        "model": {"base": str(base), "quantization": "none", "readout": "label_tokens", "label_words": WORDS},
    }
    return resolve(tree)


@pytest.fixture(scope="module")
def bundles(config: Config) -> list[Bundle]:
    return [open_bundle(folder) for folder in cross_validate(config)]


def test_a_fold_has_examples_of_its_training_rows_alone_and_the_bundle_no_weights(
    config: Config, bundles: list[Bundle]
) -> None:
    for fold, bundle in enumerate(bundles):
        examples = read_examples(bundle)
        training, held_out = Run(config).sides(fold)
        assert {row.id for row in examples} <= {*training["id"]}
        assert not {row.id for row in examples} & {*held_out["id"]}
        assert len({row.target for row in examples}) == 3 < len(examples) == 4
        assert (bundle.manifest.approach, bundle.manifest.weights) == ("prompt", "base")
        assert 0 < bundle.manifest.metrics["label_mass"] <= 1
        assert (Paths(config.output_dir or Path(), fold).folder / OOF).is_file()
    recipes = [approach_of(config).recipe(bundle) for bundle in bundles]
    assert recipes[0] != recipes[1], "folds share no inputs: their examples differ"


@pytest.mark.parametrize(
    "change",
    [
        lambda examples: examples[:3],
        lambda examples: [example | {"target": [1.0]} for example in examples],
        lambda examples: [example | {"fields": {"prompt": ["x"]}} for example in examples],
        lambda examples: [example | {"more": 1} for example in examples],
        lambda examples: 7,
    ],
    ids=["three", "one class", "one field", "unknown", "no list"],
)
def test_examples_that_the_config_does_not_want_are_refused(
    bundles: list[Bundle], tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    """Of a bundle that somebody sealed anew."""
    copy = Path(shutil.copytree(bundles[0].folder, tmp_path / "copy"))
    examples = json.loads((copy / "examples.json").read_text(encoding="utf-8"))
    (copy / "examples.json").write_text(json.dumps(change(examples)), encoding="utf-8")
    with pytest.raises(BundleError, match=r"examples\.json"):
        read_examples(Bundle(copy, bundles[0].manifest, bundles[0].config))


def fitted(config: Config, rows: pl.DataFrame, folder: Path) -> tuple[dict[str, float], Floats, set[str]]:
    """The record, the logits of all rows and the ids of the examples, with these rows to take examples from."""
    approach = approach_of(config)
    run = Run(config)
    trainer = approach.trainer(run, approach.start(config))
    model: Any = trainer.fit(Split(rows, None), folder, resume=None, trust_checkpoint=False)
    return dict(model.record), model.logits(run.frame), {row.id for row in model._examples}


def test_batch_calibration_makes_the_classes_equal_on_average_without_labels_and_tells_its_gain(
    config: Config, tmp_path: Path
) -> None:
    rows = Run(config).frame
    calibrated = override(config, ["prompt.calibration=batch"])
    (_, plain, ids), (record, logits, same) = (fitted(one, rows, tmp_path / "0") for one in (config, calibrated))
    assert ids == same
    prior = np.log(softmax(plain[[row not in ids for row in rows["id"]]], axis=2).mean(axis=(0, 1)))
    assert np.abs(plain - prior - logits).max() <= 1e-5, "of rows that are no examples, in both orders"
    assert np.ptp(prior) > 0.01
    others = np.array([row not in ids for row in rows["id"]])
    losses = [
        log_loss(targets_of(rows)[others].argmax(1), mean_of_orders(given[others], config.task, 1.0), labels=[0, 1, 2])
        for given in (plain, logits)
    ]
    assert record["calibration_gain"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    doubtful = pl.lit([0.1, 0.3, 0.6], dtype=pl.List(pl.Float64))
    turned = rows.with_columns(target=pl.when(pl.col("id").is_in(list(ids))).then("target").otherwise(doubtful))
    other, unmoved, _ = fitted(calibrated, turned, tmp_path / "1")
    assert np.array_equal(unmoved, logits), "labels do not count"
    assert other["calibration_gain"] != record["calibration_gain"]


def test_rows_are_shown_and_measured_with_examples(config: Config) -> None:
    note, shown, _ = (text.plain for text in show_rows(config, ["0"], None, coloured=False))
    assert note == "note: 4 examples of all labelled rows; a fold has its own\n"
    assert shown.count("### Verdict") == 5
    examples = with_examples(config, open_inputs(config).builder, pick_examples(Run(config).frame, config))
    rows = examples.encode(to_rows(Run(config).frame, config.task))
    (budget,), uncut = measure(config, [640], None)
    assert uncut.tolist() == [len(orders[0].ids) for orders in rows]
    assert budget.rows_cut == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt.k=9", "inputs.max_length=4000"], "prompt.k=9 needs as many training rows"),
        (["prompt.k=64"], "too small for prompt.k=64 examples"),
    ],
)
def test_what_has_no_examples_or_no_room_is_refused(
    config: Config, tmp_path: Path, overrides: list[str], message: str
) -> None:
    changed = override(config, [*overrides, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=message):
        fit(changed, 0)
    assert not list(tmp_path.glob("run/fold0/bundle"))
