"""The approach `prompt`: its folds, its bundles, and what it shows of other rows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from models_support import with_lm_head
from rich.console import Console
from scipy.special import softmax
from sklearn.metrics import log_loss
from tests_support import make_rows, write_csv
from transformers import AutoModelForCausalLM

from pairclf.approaches import approach_of
from pairclf.approaches.prompt_trainer import without_content
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.examples import read_examples
from pairclf.config import Config, override, resolve
from pairclf.data.rows import targets_of, to_rows
from pairclf.errors import BundleError, ConfigError
from pairclf.hardware import LAUNCH_SECONDS, PROFILES
from pairclf.inference.ensemble import open_ensemble
from pairclf.inference.forecast import _prepared, _resized_index, _setup_of_profile, _simulate, forecast
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.examples import pick_examples, with_examples
from pairclf.inputs.plan import DECIDED_ALONE
from pairclf.inputs.render import TEMPLATE, Encoded
from pairclf.inspect.lengths import measure
from pairclf.inspect.show import show_rows
from pairclf.model.inputs import open_inputs
from pairclf.run import OOF, Paths, Run, Split
from pairclf.runs.cv import cross_validate
from pairclf.runs.fit import fit
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import LMSYS, Row

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


def gain(config: Config, rows: pl.DataFrame, ids: set[str], before: Floats, after: Floats) -> float:
    """By how much the log loss of the rows that are no examples falls."""
    others = np.array([row not in ids for row in rows["id"]])
    losses = [
        log_loss(targets_of(rows)[others].argmax(1), mean_of_orders(given[others], config.task, 1.0), labels=[0, 1, 2])
        for given in (before, after)
    ]
    return float(losses[0] - losses[1])


def test_batch_calibration_makes_the_classes_equal_on_average_without_labels_and_tells_its_gain(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Run(config).frame
    calibrated = override(config, ["prompt.calibration=batch"])
    (_, plain, ids), (record, logits, same) = (fitted(one, rows, tmp_path / "0") for one in (config, calibrated))
    assert ids == same
    prior = np.log(softmax(plain[[row not in ids for row in rows["id"]]], axis=2).mean(axis=(0, 1)))
    assert np.abs(plain - prior - logits).max() <= 1e-5, "of rows that are no examples, in both orders"
    assert np.ptp(prior) > 0.01
    assert record["calibration_gain"] == pytest.approx(gain(config, rows, ids, plain, logits), abs=1e-5)
    doubtful = pl.lit([0.1, 0.3, 0.6], dtype=pl.List(pl.Float64))
    turned = rows.with_columns(target=pl.when(pl.col("id").is_in(list(ids))).then("target").otherwise(doubtful))
    other, unmoved, _ = fitted(calibrated, turned, tmp_path / "1")
    assert np.array_equal(unmoved, logits), "labels do not count"
    assert other["calibration_gain"] != record["calibration_gain"]
    capsys.readouterr()
    favoured = pl.lit(np.eye(3)[prior.argmax()].tolist(), dtype=pl.List(pl.Float64))
    right = rows.with_columns(target=pl.when(pl.col("id").is_in(list(ids))).then("target").otherwise(favoured))
    harmed, _, _ = fitted(calibrated, right, tmp_path / "2")
    assert harmed["calibration_gain"] < 0
    warning = f"batch calibration made the log loss worse by {-harmed['calibration_gain']:.4f}"
    assert warning in (shown := capsys.readouterr().err)
    assert "set prompt.calibration=none" in shown
    unfavoured = pl.lit(np.eye(3)[prior.argmin()].tolist(), dtype=pl.List(pl.Float64))
    wrong = rows.with_columns(target=pl.when(pl.col("id").is_in(list(ids))).then("target").otherwise(unfavoured))
    helped, _, _ = fitted(calibrated, wrong, tmp_path / "3")
    assert helped["calibration_gain"] > 0
    assert "worse" not in capsys.readouterr().err


def _before_texts(order: Encoded) -> list[int]:
    start = next(span.start for span in order.spans if span.name != TEMPLATE)
    return order.ids[:start].tolist()


def test_contextual_calibration_divides_by_what_rows_without_content_have(config: Config, tmp_path: Path) -> None:
    """Behind the examples and behind their mirrors, by the stock LM."""
    rows = Run(config).frame
    calibrated = override(config, ["prompt.calibration=contextual"])
    (_, plain, ids), (record, logits, _) = (fitted(one, rows, tmp_path / "0") for one in (config, calibrated))
    examples = [row for row in pick_examples(rows, config) if row.id in ids]
    opened = open_inputs(config)
    heading, names = "\n\n### {}\n{}".format, ("Prompt", "Response a", "Response b")
    texts = ["".join(heading(name, text) for name in names) + "\n\n### Verdict\n" for text in ("N/A", "", "[MASK]")]
    shown = without_content(config, opened.builder, examples)
    decoded = [opened.tokenizer.decode(orders[0].ids) for orders in shown]
    builder = with_examples(config, opened.builder, examples)
    before_a_row = [_before_texts(order) for order in builder.encode(to_rows(rows, config.task)[:1])[0]]
    assert before_a_row[0] != before_a_row[1]
    numbers = [before_a_row.index(_before_texts(order)) for orders in shown for order in orders]
    assert numbers == 6 * [numbers[0]] + 6 * [1 - numbers[0]]
    assert [text.endswith(ending) for text, ending in zip(decoded, 2 * texts, strict=True)] == [True] * 6
    lm = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    tokens = [int(opened.builder.tokenizer([word], special=True)[0][0]) for word in WORDS.values()]
    with torch.inference_mode():
        states = [lm(torch.from_numpy(orders[0].ids).long()[None]).logits[0, -1, tokens].double() for orders in shown]
    prior = torch.stack(states).softmax(dim=1).mean(dim=0).log().numpy()
    assert np.ptp(prior) > 0.01
    assert np.abs(plain - prior - logits).max() <= 1e-5
    assert record["calibration_gain"] == pytest.approx(gain(config, rows, ids, plain, logits), abs=1e-5)


LONG = Row("long", {"prompt": ("w" * 100_000,), "response_a": ("a",), "response_b": ("b",)}, (1.0, 0.0, 0.0))
EMPTY = Row("empty", dict.fromkeys(LMSYS.fields, ("",)), (1.0, 0.0, 0.0))
STRANGE: dict[str, list[Row]] = {
    "a class is missing": [row for row in make_rows(9) if row.target != (0.0, 0.0, 1.0)],
    "one class only": [row for row in make_rows(12) if row.target == (0.0, 1.0, 0.0)],
    "one row": make_rows(1),
    "empty texts": [EMPTY, replace(EMPTY, id="too"), *make_rows(3)],
    "100,000 tokens": [LONG, *make_rows(3)],
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("approach", ["prompt", "finetune"])
def test_few_rows_and_strange_ones_are_trained_on_and_scored(
    config: Config, tmp_path: Path, approach: str, name: str
) -> None:
    """All three classes are told apart, whatever the fold's training rows show of them."""
    held_out = [replace(row, id=f"held out {row.id}") for row in (*make_rows(2), EMPTY, LONG)]
    write_csv(tmp_path / "train.csv", [*STRANGE[name], *held_out])
    own: dict[str, Any] = {"prompt": {"k": 1, "calibration": "contextual"}, "train": {"max_steps": 1}}
    tree = {**config.model_dump(include={"model", "folds"}), "approach": approach, "output_dir": str(tmp_path / "run")}
    tree["model"] |= {"lora": {"r": 2}} if approach == "finetune" else {}
    section = "prompt" if approach == "prompt" else "train"
    data = {"folder": str(tmp_path), "train": "train.csv"}
    changed = resolve({**tree, "data": data, "inputs": {"max_length": 300, "num_proc": 1}, section: own[section]})
    run = Run(changed)
    ids = {row.id for row in held_out}
    split = Split(*(run.frame.filter(pl.col("id").is_in(list(ids)) != training) for training in (True, False)))
    trainer = approach_of(changed).trainer(run, approach_of(changed).start(changed))
    model = trainer.fit(split, tmp_path / "fold", resume=None, trust_checkpoint=False)
    assert model is not None
    logits = model.logits(run.frame)
    assert logits.shape == (len(run.frame), 2, 3)
    assert np.isfinite(logits).all()


def test_rows_are_shown_and_measured_with_examples(config: Config) -> None:
    note, shown, _ = (text.plain for text in show_rows(config, ["0"], None, coloured=False))
    assert note == "note: 4 examples of all labelled rows; a fold has its own\n"
    assert shown.count("### Verdict") == 5
    examples = with_examples(config, open_inputs(config).builder, pick_examples(Run(config).frame, config))
    rows = examples.encode(to_rows(Run(config).frame, config.task))
    (budget,), uncut = measure(config, [640], None)
    assert uncut.tolist() == [len(orders[0].ids) for orders in rows]
    assert budget.rows_cut == 0


def test_the_forecast_counts_examples_once_a_pass_and_a_rationales_tokens(
    config: Config, bundles: list[Bundle], tmp_path: Path
) -> None:
    """On a device whose memory is slow: then a token that is written costs as much as the weights take to be read."""
    data = (config.data.folder / "train.csv", tmp_path / "test.csv")
    pl.read_csv(data[0]).drop(config.task.classes).write_csv(data[1])
    tree = config.model_dump(include={"approach", "data", "folds", "model"})
    prompt = {"k": 0, "rationale": 8}
    settings = {"output_dir": tmp_path / "run", "inputs": {"max_length": 640, "num_proc": 1}, "prompt": prompt}
    writer = open_bundle(fit(resolve(tree | settings), 0))
    slow = replace(PROFILES["t4"], bandwidth=1e6)
    ensembles = [open_ensemble([bundle.folder], None, []) for bundle in (bundles[0], writer)]
    approach, used, rows = approach_of(config), [], 2_000
    for ensemble in ensembles:
        inputs = [_resized_index(one.inputs, rows) for one in _prepared(ensemble, data[1], tmp_path)]
        setup = _setup_of_profile(ensemble, slow)
        used.append(_simulate(ensemble, setup, inputs, float("inf")).used - setup.load_seconds[0])
    plain, written = (approach.cost(bundle, None) for bundle in (bundles[0], writer))
    twice = 2 + 8 * DECIDED_ALONE
    assert (written.linear, written.quadratic) == (twice * plain.linear, twice * plain.quadratic)
    assert written.moved == written.bytes
    pending = PendingSequences(inputs[0][0], (0, 1))
    pending.layout = setup.layout
    batches, sequences = len(pending.batches(setup.budget)), int(pending.is_pending.sum())
    passes = (1 + 8) * batches + 8 * DECIDED_ALONE * sequences
    assert 8 * batches < sequences, "a token of a batch is one pass"
    assert used[1] == pytest.approx(passes * written.bytes / 1e6, rel=0.2)
    instant = replace(PROFILES["t4"], bandwidth=1e18, flops=1e18)
    setup = _setup_of_profile(ensembles[1], instant)
    assert (plain.launched, written.launched) == (0, 2 * LAUNCH_SECONDS), "two layers"
    waited = _simulate(ensembles[1], setup, inputs, float("inf")).used - setup.load_seconds[0]
    assert waited == pytest.approx(passes * written.launched, rel=0.2)
    shared = _setup_of_profile(ensembles[0], slow)
    packed = replace(shared, layout="packed")
    index = [_resized_index(one.inputs, rows) for one in _prepared(ensembles[0], data[1], tmp_path)]
    assert len(index[0][0].prefixes) == 3
    longer = _simulate(ensembles[0], packed, index, float("inf")).used - packed.load_seconds[0]
    assert used[0] < 0.6 * longer
    (report, _) = forecast([writer.folder], data[1], device="t4", deadlines=["1h"])
    console = Console(width=200)
    with console.capture() as shown:
        console.print(report)
    assert re.search(r"a rationale before each label +at most 8 tokens, a forward pass of a batch each", shown.get())


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
