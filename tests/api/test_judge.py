"""A judge gives what `pairclf predict` and `pairclf rank` give, for every form of rows; and the same errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.faults import faulty
from support.runs import bundles_of, random_bundle, run_config

import pairclf
from pairclf.api import judge as judges
from pairclf.errors import BundleError, ConfigError, DataError, IncompleteError
from pairclf.inference.predict import predict
from pairclf.inference.rank import rank
from pairclf.scores import probabilities
from pairclf.task import LMSYS

CLASSES = list(LMSYS.classes)
ROW = {"prompt": "what?", "response_a": "good answer", "response_b": "bad answer"}


@pytest.fixture(scope="module")
def judge(classical_bundles: list[Path]) -> Iterator[pairclf.Judge]:
    with pairclf.load(classical_bundles, device="cpu") as loaded:
        yield loaded


def values(scores: pl.DataFrame, ending: str = "") -> np.ndarray:
    return scores.select(f"{name}{ending}" for name in CLASSES).to_numpy()


# --- the figures of `pairclf predict` --------------------------------------------------------------------------------


def test_a_language_models_figures_are_those_of_predict(
    trained_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folds, both orders, in parts of seven rows; and not without the un-swap."""
    run = trained_run("llama")
    whole = predict(bundles_of(run), run / "test.csv", None, scores=tmp_path / "scores.parquet")
    monkeypatch.setattr(judges, "CHUNK", 7)
    rows = pl.read_csv(run / "test.csv")
    with pairclf.load(bundles_of(run), device="cpu") as judge:
        scores = judge.predict(rows, orders=True)
        assert scores["id"].to_list() == rows["id"].to_list()
        assert np.abs(values(scores) - values(whole)).max() <= 1e-6
        mean = (values(scores, "_AB") + values(scores, "_BA")) / 2
        assert np.abs(mean - values(scores)).max() <= 1e-9
        assert np.abs(values(scores, "_AB") - values(scores, "_BA")).max() > 1e-3
        monkeypatch.setattr(probabilities, "unswap", lambda scores, task: scores)
        assert np.abs(values(judge.predict(rows)) - values(whole)).max() > 1e-3


def test_an_ensembles_file_has_its_weights_and_its_member_for_uncertain_rows(
    classical_bundles: list[Path], pairs_of_words: tuple[pl.DataFrame, np.ndarray], tmp_path: Path
) -> None:
    first, second = classical_bundles
    members = [{"bundle": str(first), "weight": 3, "temperature": 2}, {"bundle": str(second), "share": 0.5}]
    (tmp_path / "ensemble.yaml").write_text(json.dumps({"members": members, "temperature": 1.5}))
    rows = pairs_of_words[0].with_row_index("id")
    rows.write_parquet(tmp_path / "test.parquet")
    file = tmp_path / "ensemble.yaml"
    whole = predict([file], tmp_path / "test.parquet", None, scores=tmp_path / "scores.parquet")
    with pairclf.load(file) as judge, pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "CHUNK", 5)  # which would choose other rows for the second member
        assert np.array_equal(values(judge.predict(rows)), values(whole))


@pytest.mark.parametrize("form", ["polars", "pandas", "dict", "keywords"])
def test_rows_of_any_form_have_the_same_scores(
    form: str, judge: pairclf.Judge, pairs_of_words: tuple[pl.DataFrame, np.ndarray]
) -> None:
    rows = pairs_of_words[0].head(6)
    expected = values(judge.predict(rows))
    if form == "keywords":
        scores = judge.predict(**rows.to_dict(as_series=False))
    else:
        shape = {"polars": rows, "pandas": rows.to_pandas(), "dict": rows.to_dict(as_series=False)}
        scores = judge.predict(shape[form])
    assert scores.columns == ["id", *CLASSES]
    assert scores["id"].to_list() == [*range(6)]
    assert np.array_equal(values(scores), expected)


def test_one_row_is_given_as_texts(judge: pairclf.Judge) -> None:
    """A text is taken as it is, not read as a list of turns."""
    single = judge.predict(**ROW)
    assert np.array_equal(values(single), values(judge.predict({name: [text] for name, text in ROW.items()})))
    assert values(single)[0].argmax() == 0
    listed = ROW | {"response_b": '["good answer"]'}
    assert not np.array_equal(
        values(judge.predict(**listed)), values(judge.predict(**{k: [v] for k, v in listed.items()}))
    )


def test_ids_keep_their_type_and_order_and_may_repeat(judge: pairclf.Judge) -> None:
    rows = pl.DataFrame({"id": ["b", "a", "b"], **{name: [text] * 3 for name, text in ROW.items()}})
    assert judge.predict(rows)["id"].to_list() == ["b", "a", "b"]
    assert judge.predict(rows[:0], orders=True).schema == judge.predict(rows, orders=True).schema


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_ranking_is_that_of_the_command(judge: pairclf.Judge, classical_bundles: list[Path], tmp_path: Path) -> None:
    prompts = {"what?": ["bad answer", "good answer", "other", "good answer"], "how?": ["alone"]}
    rows = [{"id": prompt, "prompt": prompt, "answers": answers} for prompt, answers in prompts.items()]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = rank(classical_bundles, file, tmp_path / "ranking.csv")
    assert_frame_equal(judge.rank(pl.DataFrame(rows)), table)
    single = judge.rank("what?", prompts["what?"])
    assert_frame_equal(single.drop("id"), table.head(4).drop("id"))
    assert single["rank"].to_list()[1] == single["rank"].to_list()[3] == 1
    assert judge.rank("how?", ["alone"])["strength"].to_list() == [0.0]


@pytest.mark.parametrize("tie_model", ["davidson", "rao_kupper"])
def test_a_reward_models_answers_have_rewards_and_its_rows_probabilities(
    tie_model: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = {"readout": "reward", "tie_model": tie_model}
    config = run_config(tmp_path, base_of("llama"), model=model, inputs={"max_length": 300})
    bundle = random_bundle(tmp_path / "fold0" / "bundle", config)
    answers = ["So.", "Or so, at length.", "So."]
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"id": "prompt", "prompt": ["Why?"], "answers": answers}) + "\n")
    with pairclf.load(bundle) as judge:
        table = judge.rank("Why?", answers)
        assert np.abs(table["reward"] - rank([bundle], file, tmp_path / "r.csv")["reward"]).max() <= 1e-6
        row = judge.predict(prompt="Why?", response_a=answers[0], response_b=answers[1], rewards=True)
        rewards = row.select("reward_response_a", "reward_response_b").row(0)
        assert np.abs(np.array(rewards) - table["reward"].to_numpy()[:2]).max() <= 1e-5
        wins = values(row)[0]
        assert (wins[0] > wins[1]) == (table["reward"][0] > table["reward"][1])
        with pytest.raises(ConfigError, match="changes nothing"):
            judge.rank("Why?", answers, pairs=3)


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_odd_column_of_pandas_matters_where_it_is_read(judge: pairclf.Judge) -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame({name: [text, text] for name, text in ROW.items()}, index=[7, 7])
    assert_frame_equal(judge.predict(rows.assign(source=["web", 1])), judge.predict(rows))
    with pytest.raises(DataError, match=r"columns \['response_a'\]"):
        judge.predict(rows.assign(response_a=["yes", 1]))
    with pytest.raises(DataError, match="rows can't be taken from a Series"):
        judge.predict(rows["prompt"])


def test_errors_name_what_is_wrong(judge: pairclf.Judge, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="response_b"):
        judge.predict(pl.DataFrame({"prompt": ["a"], "response_a": ["b"]}))
    with pytest.raises(DataError, match="both or none"):
        judge.predict()
    with pytest.raises(DataError, match="make no table"):
        judge.predict(prompt=["a", "b"], response_a=["a", "b", "c"], response_b=["c", "d"])
    with pytest.raises(DataError, match="order are neither fields"):
        judge.predict(**ROW, order=True)
    with pytest.raises(ConfigError, match="not all models are reward models"):
        judge.predict(**ROW, rewards=True)
    with pytest.raises(DataError, match="has its answers itself"):
        judge.rank({"prompt": ["a"], "answers": [["b", "c"]]}, ["d", "e"])
    with pytest.raises(DataError, match="a list of answers"):
        judge.rank("what?")
    with pytest.raises(ConfigError, match=r"answers='an answer' is of type str; it must be Sequence\[str\]"):
        judge.rank("what?", "an answer")
    with pytest.raises(BundleError, match="no bundle"):
        pairclf.load(tmp_path)
    with pytest.raises(ConfigError, match="can't be set for a trained bundle"):
        pairclf.load(tmp_path, "train.seed=1")
    with pytest.raises(ConfigError, match="revision"):
        pairclf.load(tmp_path, revision="main")
    with pytest.raises(ConfigError, match="device='tpu' is unknown"):
        pairclf.load(tmp_path, device="tpu")


def test_a_row_that_can_not_be_scored_is_an_error_or_has_the_prior(
    classical_bundles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from pairclf.inference import pool, resident

    load = partial(faulty, kind="raise", row=1)
    monkeypatch.setattr(resident, "ProcessPool", partial(pool.ProcessPool, load=load))
    rows = {name: [text, f"{text} too"] for name, text in ROW.items()}
    with pairclf.load(classical_bundles[0]) as judge:
        with pytest.raises(IncompleteError, match=r"(?s)not all could be scored.*rows: +1"):
            judge.predict(rows)
        scores = judge.predict(rows, strict=False)
        assert np.allclose(values(scores)[1], judge.ensemble.prior)
        assert not np.allclose(values(scores)[0], judge.ensemble.prior)


def test_a_changed_bundle_is_refused(classical_bundles: list[Path], tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(classical_bundles[0], tmp_path / "bundle")
    (copy / "classical.safetensors").write_bytes(b"x" + (copy / "classical.safetensors").read_bytes()[1:])
    with pairclf.load(copy) as judge, pytest.raises(BundleError, match=r"classical\.safetensors"):
        judge.predict(**ROW)


def test_a_script_needs_no_main_guard(classical_bundles: list[Path], tmp_path: Path) -> None:
    """Workers don't run the user's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import pairclf\nprint('once')\njudge = pairclf.load({str(classical_bundles[0])!r})\n"
        f"print(len(judge.predict(**{ROW!r})))\n"
    )
    root = str(Path(pairclf.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["once", "1"]


def test_a_judge_shows_as_a_table(judge: pairclf.Judge) -> None:
    assert "run-fold0" in judge._repr_html_()
    assert "classical" in judge._repr_html_()
    assert "winner_tie" in repr(judge)
