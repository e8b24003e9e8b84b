"""Best of n: rewards of answers alone and of all in one pass, strengths from pairs, and what happens on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from support.faults import quick
from support.runs import random_bundle, run_config
from support.tables import canonical

from pairclf.approaches import approach_of
from pairclf.bundles.bundle import open_bundle
from pairclf.config import resolve
from pairclf.data.rows import to_rows
from pairclf.errors import ConfigError, DataError, IncompleteError, StopError
from pairclf.inference import predict as job
from pairclf.inference.pool import ProcessPool
from pairclf.inference.predict import predict
from pairclf.inference.rank import rank
from pairclf.inputs.render import Encoded
from pairclf.inputs.sequences import Item
from pairclf.model.layouts import shared
from pairclf.model.weights import load_classifier
from pairclf.runs.cv import cross_validate
from pairclf.scores.metrics import Floats

pytestmark = pytest.mark.usefixtures("quick_workers")

WHY = "Why is the sky blue, and why at noon?"
PROMPTS: dict[str, list[str]] = {
    WHY: ["So.", "Or so, at length.", "", "So.", "Because of the light " * 3],
    "How?": ["one answer"],
    "Then?": ["b", "a", "c"],
}


def write_answers(path: Path, prompts: dict[str, list[str]]) -> Path:
    rows = [{"id": prompt, "prompt": [prompt], "answers": answers} for prompt, answers in prompts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reward(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward bundle, whose head is random."""
    folder = tmp_path_factory.mktemp("reward")
    config = run_config(folder, base_of("llama"), model={"readout": "reward"}, inputs={"max_length": 300})
    return random_bundle(folder / "fold0" / "bundle", config)


@pytest.fixture(scope="module")
def classical(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folds of a classical model."""
    folder = tmp_path_factory.mktemp("classical")
    answers = [f"{word} {number}" for number, word in enumerate(["good", "bad", "so so"] * 12)]
    frame = canonical([f"prompt {number}" for number in range(36)], [number % 3 for number in range(36)])
    frame = frame.with_columns(response_a=pl.Series([[text] for text in answers]))
    columns = ("winner_model_a", "winner_model_b", "winner_tie")
    labels = [pl.col("target").list.get(place).alias(name) for place, name in enumerate(columns)]
    frame.select("id", "prompt", "response_a", "response_b", *labels).write_parquet(folder / "train.parquet")
    tree = {
        "task": "lmsys", "approach": "classical", "output_dir": str(folder / "run"),
        "data": {"folder": str(folder), "train": "train.parquet"},
        "folds": {"n_splits": 2, "near_duplicate_threshold": None}, "classical": {"n_features": 512},
    }  # fmt: skip
    cross_validate(resolve(tree))
    return [folder / "run" / f"fold{fold}" / "bundle" for fold in (0, 1)]


def rewards_alone(folder: Path, prompt: str, answer: str) -> float:
    """The head's product with the last state of prompt and answer, in a pass of its own, by the pair's recipe."""
    bundle = open_bundle(folder)
    classifier = load_classifier(bundle, torch.device("cpu"))
    (row,) = to_rows(canonical([prompt], a=answer, b=answer), bundle.config.task)
    ((pair,),) = approach_of(bundle.config).encode(bundle, [row])
    start, first, second = np.split(pair.ids, np.flatnonzero(pair.ids == -1))
    assert np.array_equal(first, second)
    ids = torch.from_numpy(np.concatenate([start, first[1:]])).long()[None]
    with torch.inference_mode():
        state = classifier.backbone(input_ids=ids).last_hidden_state[0, -1]
        return float(state.float() @ classifier.head.get_parameter("weight")[0])


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_each_answer_alone_in_any_order(reward: Path, tmp_path: Path) -> None:
    table = rank([reward], write_answers(tmp_path / "a.jsonl", PROMPTS), tmp_path / "ranking.parquet")
    assert_frame_equal(pl.read_parquet(tmp_path / "ranking.parquet"), table)
    assert not (tmp_path / "ranking.work").exists()
    texts = [(prompt, answer) for prompt, answers in PROMPTS.items() for answer in answers]
    expected = np.array([rewards_alone(reward, *text) for text in texts])
    assert np.ptp(expected) > 0.01
    assert np.abs(table["reward"].to_numpy() - expected).max() <= 1e-5
    assert table["answer"].to_list() == [0, 1, 2, 3, 4, 0, 0, 1, 2]
    assert table["reward"][0] == table["reward"][3], "equal answers"
    for answers in table.partition_by("id"):
        ranks = [1 + int((answers["reward"] > value).sum()) for value in answers["reward"]]
        assert answers["rank"].to_list() == ranks
    turned = {prompt: answers[::-1] for prompt, answers in reversed(PROMPTS.items())}
    other = rank([reward], write_answers(tmp_path / "b.jsonl", turned), tmp_path / "other.csv")
    assert np.allclose(other["reward"].to_numpy()[::-1], table["reward"].to_numpy(), rtol=1e-6)
    alone = {prompt: answers[:1] for prompt, answers in PROMPTS.items()}
    single = rank([reward], write_answers(tmp_path / "c.jsonl", alone), tmp_path / "single.jsonl")
    assert np.allclose(single["reward"].to_numpy(), table.filter(answer=0)["reward"].to_numpy(), rtol=1e-6)
    assert single["rank"].to_list() == [1, 1, 1]


def test_all_answers_of_a_prompt_are_branches_in_one_pass(
    reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Any] = []
    loops: list[Any] = []
    encoded: list[tuple[Encoded, ...]] = []

    class Watched(job.PredictionLoop):
        def __init__(self, models: Any, *arguments: Any, **keywords: Any) -> None:
            super().__init__(models, *arguments, **keywords)
            loops.append(self)

    class Pool(ProcessPool):
        def __init__(self, models: Any, *arguments: Any, **keywords: Any) -> None:
            super().__init__(models, *arguments, **keywords, load=quick)
            encoded.extend(models[0].encoded)

        def submit(self, work: Any) -> None:
            passes.append([row for row, _ in work.row_orders])
            super().submit(work)

    monkeypatch.setattr(job, "PredictionLoop", Watched)
    monkeypatch.setattr(job, "ProcessPool", Pool)
    prompts = {f"{number} what a long prompt this is": ["a " * count for count in range(8)] for number in range(3)}
    data, budget = write_answers(tmp_path / "a.jsonl", prompts), ["predict.tokens_per_batch=600"]
    rank([reward], data, tmp_path / "r.csv", overrides=budget)
    assert [len(rows) for rows in passes] == [16, 8]
    assert all(len({row // 8 for row in rows}) == len(rows) // 8 for rows in passes), "prompts are whole"
    computed = sum(_tokens(encoded, rows) for rows in passes)
    assert loops[0].result.tokens == computed, "the planner counts what is computed"
    assert computed < 0.6 * sum(len(row[0].ids) for row in encoded)
    passes.clear()
    monkeypatch.setattr(job, "_in_units", lambda prepared, groups, budget: list(prepared))
    rank([reward], data, tmp_path / "r.csv", overrides=budget)
    assert sum(_tokens(encoded, rows) for rows in passes) > 1.3 * computed, "rows of one length are of all prompts"


def _tokens(encoded: list[tuple[Encoded, ...]], rows: list[int]) -> int:
    ids = shared([Item(row, 0, encoded[row][0].ids) for row in rows]).inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids.numel()


def test_rewards_of_models_are_averaged_and_predict_ranks_pairs_alike(
    reward: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = run_config(tmp_path, base_of("llama"), model={"readout": "reward"}, inputs={"max_length": 300})
    other = random_bundle(tmp_path / "fold1" / "bundle", config, seed=5, fold=1)
    data = write_answers(tmp_path / "a.jsonl", {"Then?": ["b", "a"], "How?": ["c", "d"]})
    each = [rank([one], data, tmp_path / "r.csv")["reward"].to_numpy() for one in (reward, other)]
    both = rank([reward, other], data, tmp_path / "r.csv", overrides=["predict.temperature=2"])["reward"].to_numpy()
    assert np.abs(both - np.mean(each, axis=0) / 2).max() <= 1e-6
    file = tmp_path / "ensemble.yaml"
    file.write_text(f"members: [{{bundle: {reward}, tie_bias: -0.3}}]\ntemperature: 2\ntie_scale: 0.5\n")
    alone = rank([file], data, tmp_path / "r.csv")["reward"].to_numpy()  # a reward has no tie to be scaled
    assert np.abs(alone - each[0] / 2).max() <= 1e-6
    texts = canonical(["Then?", "How?"]).with_columns(response_a=pl.Series([["b"], ["c"]]))
    texts = texts.with_columns(response_b=pl.Series([["a"], ["d"]]))
    texts.select("id", "prompt", "response_a", "response_b").write_parquet(tmp_path / "test.parquet")
    scores = predict([reward], tmp_path / "test.parquet", None, scores=tmp_path / "scores.parquet")
    odds = np.log(scores["winner_model_a"] / scores["winner_model_b"]).to_numpy()
    assert np.abs(odds - (each[0][::2] - each[0][1::2])).max() <= 1e-5


def test_an_answer_of_many_tokens_is_cut(reward: Path, tmp_path: Path) -> None:
    answers = ["word " * 20_000, "short", "word " * 20_001]
    table = rank([reward], write_answers(tmp_path / "a.jsonl", {"Why?": answers}), tmp_path / "r.csv")
    assert table["rank"].is_not_null().all()
    assert table["reward"].n_unique() >= 2


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_strengths_are_those_of_predicted_pairs(classical: list[Path], tmp_path: Path) -> None:
    table = rank(classical, write_answers(tmp_path / "a.jsonl", PROMPTS), tmp_path / "ranking.csv")
    assert table.columns == ["id", "answer", "strength", "rank"]
    assert table.filter(id="How?").rows() == [("How?", 0, 0.0, 1)]
    assert table["strength"][0] == table["strength"][3]
    assert table.filter(id=WHY)["strength"].n_unique() == 4
    data = write_answers(tmp_path / "b.jsonl", {f"prompt {number}": ["good", f"bad {number}"] for number in range(5)})
    two = rank(classical, data, tmp_path / "two.csv")
    texts = canonical([f"prompt {number}" for number in range(5)], a="good")
    texts = texts.with_columns(response_b=pl.Series([[f"bad {number}"] for number in range(5)]))
    texts.select("id", "prompt", "response_a", "response_b").write_parquet(tmp_path / "test.parquet")
    scores = predict(classical, tmp_path / "test.parquet", None, scores=tmp_path / "scores.parquet")
    odds = np.log(scores["winner_model_a"] / scores["winner_model_b"]).to_numpy()
    assert np.abs(odds).min() > 1e-4
    strengths: Floats = two["strength"].to_numpy()
    assert np.abs(strengths[::2] - strengths[1::2] - odds).max() <= 1e-6
    assert [ranks.tolist() for ranks in two["rank"].to_numpy().reshape(-1, 2)] == [
        [1, 2] if value > 0 else [2, 1] for value in odds
    ]


def test_one_answer_for_each_prompt_needs_no_scoring(classical: list[Path], tmp_path: Path) -> None:
    data = write_answers(tmp_path / "a.jsonl", {"Why?": ["so", "so"], "How?": [""]})
    table = rank(classical, data, tmp_path / "r.csv")
    assert table.select("strength", "rank").rows() == [(0.0, 1)] * 3


def test_stopped_ranking_resumes_from_the_journal(
    classical: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_answers(tmp_path / "a.jsonl", PROMPTS), tmp_path / "r.csv"
    expected = rank(classical, data, tmp_path / "whole.csv")
    loop = job.PredictionLoop

    class Stopped(loop):
        def run(self, **keywords: Any) -> Any:
            result = super().run(tick=keywords["tick"])
            result.stop_signal = 15
            return result

    monkeypatch.setattr(job, "PredictionLoop", Stopped)
    with pytest.raises(StopError, match="holds the ranking so far"):
        rank(classical, data, out)
    monkeypatch.setattr(job, "PredictionLoop", loop)
    capsys.readouterr()
    assert_frame_equal(rank(classical, data, out), expected)
    assert "sequences are taken from the journal" in capsys.readouterr().err


def test_passed_deadline_leaves_answers_without_ranks(classical: list[Path], tmp_path: Path) -> None:
    data, out = write_answers(tmp_path / "a.jsonl", PROMPTS), tmp_path / "r.csv"
    with pytest.raises(IncompleteError, match="the ranking is incomplete") as error:
        rank(classical, data, out, deadline="10s", spent=10.0, strict=True)
    assert error.value.rows == (WHY, "Then?")
    assert pl.read_csv(out).filter(id=WHY)["rank"].null_count() == 5
    assert rank(classical, data, out, strict=True)["rank"].null_count() == 0


# --- what can't be ranked --------------------------------------------------------------------------------------------


def test_what_can_not_be_ranked_is_refused(reward: Path, classical: list[Path], tmp_path: Path) -> None:
    data, out = write_answers(tmp_path / "a.jsonl", PROMPTS), tmp_path / "r.csv"
    with pytest.raises(ConfigError, match=r"gives each answer a reward, and .* compares pairs"):
        rank([reward, *classical], data, out)
    with pytest.raises(ConfigError, match="--pairs 3 changes nothing"):
        rank([reward], data, out, pairs=3)
    with pytest.raises(ConfigError, match=r"r.txt: a ranking's file ends in .csv, .parquet, .jsonl"):
        rank([reward], data, tmp_path / "r.txt")
    with pytest.raises(DataError, match="--pairs 2 does not connect 4 different answers"):
        rank(classical, data, out, pairs=2)
    assert not out.exists()


def test_command_writes_a_ranking(cli: Callable[..., tuple[int, str]], classical: list[Path], tmp_path: Path) -> None:
    data, out = write_answers(tmp_path / "a.jsonl", PROMPTS), tmp_path / "r.jsonl"
    code, text = cli("rank", classical[0], "--data", data, "--out", out, "--pairs", 3)
    assert code == 0, text
    assert "9 answers of 3 prompts, by strength" in text
    assert pl.read_ndjson(out).columns == ["id", "answer", "strength", "rank"]
    code, text = cli("rank", classical[0], "--data", tmp_path / "none.jsonl")
    assert code == 2
    assert "none.jsonl" in text
