"""Suspect labels: found in a run, explained, written as soft labels that training reads and held-out rows never do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.config import dump_config, load_config
from pairclf.data.rows import targets_of
from pairclf.data.scores import class_matrix, read_scores, write_scores
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.run import OOF, Run, output_of
from pairclf.runs.suspects import IDS, find_suspects, next_command, other_labels, write_suspects
from pairclf.task import LMSYS

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def scores(arms: Path) -> pl.DataFrame:
    return read_scores(arms / "runs" / "strong" / OOF, LMSYS)


@pytest.fixture(scope="module")
def written(arms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suspects") / "suspects.parquet"
    write_suspects(out, find_suspects(arms / "runs" / "strong"))
    return out


def test_every_scored_row_is_judged_the_most_suspicious_first(arms: Path, written: Path, scores: pl.DataFrame) -> None:
    frame = pl.read_parquet(written)
    assert sorted(frame["id"]) == sorted(scores["id"])
    assert frame["p_wrong"].is_sorted(descending=True)
    labels = pl.read_csv(arms / "train.csv", schema_overrides={"id": pl.String})
    given = labels.select(
        "id", label=pl.concat_list(LMSYS.classes).list.arg_max().replace_strict(range(3), LMSYS.classes)
    )
    joined = frame.join(given, on="id", suffix="_given")
    assert joined["label"].equals(joined["label_given"], check_names=False)
    first = frame.row(0, named=True)
    assert first["label"] != first["likeliest"]
    assert first["reasons"][0].startswith(f"both orders give {first['likeliest']} 0.")
    soft = class_matrix(frame, LMSYS)
    own = np.array([LMSYS.classes.index(name) for name in frame["label"]])
    assert soft[np.arange(len(own)), own] == pytest.approx(1 - frame["p_wrong"].to_numpy())


def test_training_reads_the_soft_labels_and_held_out_rows_keep_theirs(arms: Path, written: Path) -> None:
    config = load_config(arms / "plain.yaml")
    soft = load_config(arms / "plain.yaml", [f"data.soft_labels={config.data.name_of(written)}"])
    by_id = dict(
        zip(pl.read_parquet(written)["id"], class_matrix(pl.read_parquet(written), LMSYS).tolist(), strict=True)
    )
    for fold in (0, 1):
        (training, held_out), (given, given_held_out) = Run(soft).split(fold), Run(config).split(fold)
        assert held_out is not None
        assert given_held_out is not None
        assert held_out.equals(given_held_out)
        assert training.drop("target").equals(given.drop("target"))
        assert targets_of(training) == pytest.approx(np.array([by_id[row] for row in training["id"]]))
        assert np.abs(targets_of(training) - targets_of(given)).max() > 0.2
    everything, nothing = Run(soft).split(None)
    assert nothing is None
    assert targets_of(everything).max(axis=1).min() < 1


def test_the_printed_command_trains_and_judges_by_the_given_labels(arms: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "suspects.parquet"
    code, text = cli("suspects", arms / "plain.yaml", "--out", out, "--top", 2)
    assert code == 0
    assert "labels are probably wrong" in text
    command = shlex.split("pairclf cv" + text.rpartition("pairclf cv")[2])
    assert command[1:3] == ["cv", str(arms / "plain.yaml")]
    code, text = cli(*command[1:-1], f"output_dir={tmp_path / 'again'}")
    assert code == 0, text
    plain, again = (pl.read_parquet(folder / OOF) for folder in (arms / "runs" / "plain", tmp_path / "again"))
    judged = again.join(plain, on="id", suffix="_plain")
    for name in LMSYS.classes:
        assert judged[f"target_{name}"].equals(judged[f"target_{name}_plain"], check_names=False)
    assert np.abs(judged[LMSYS.classes[0]] - judged[f"{LMSYS.classes[0]}_plain"]).max() > 0.01


def test_json_has_the_figures_and_the_first_rows(arms: Path, cli: Cli, tmp_path: Path) -> None:
    code, text = cli("suspects", arms / "runs" / "strong", "--out", tmp_path / "s.parquet", "--top", 3, "--json")
    assert code == 0
    figures, _ = json.JSONDecoder().raw_decode(text)
    assert figures["rows"] == 148
    assert len(figures["first"]) == 3
    assert figures["expected"] == pytest.approx(pl.read_parquet(tmp_path / "s.parquet")["p_wrong"].sum())
    assert figures["first"][0].keys() == {"id", "p_wrong", "label", "likeliest", "reasons"}


def test_rows_with_the_same_texts_are_named_as_reasons(arms: Path, tmp_path: Path, scores: pl.DataFrame) -> None:
    """A copy with its sides exchanged and its label not: one of both is wrong."""
    train = pl.read_csv(arms / "train.csv", infer_schema=False)
    winners = train.filter(pl.col("winner_tie") == "0")
    row = winners.filter(winners["response_a"] != winners["response_b"]).head(1)
    mirror = row.with_columns(id=pl.lit("999"), response_a="response_b", response_b="response_a")
    right = mirror.with_columns(winner_model_a="winner_model_b", winner_model_b="winner_model_a")
    config = load_config(arms / "plain.yaml", [f"data.folder={tmp_path}", f"output_dir={tmp_path / 'run'}"])
    own = scores.filter(pl.col("id") == row["id"][0]).with_columns(row_hash=pl.lit(None, dtype=pl.UInt64))
    write_scores(tmp_path / "scores.parquet", pl.concat([scores, own.with_columns(id=pl.lit("999"))]))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    verdicts = []
    for copy in (mirror, right):
        pl.concat([train, copy]).write_csv(tmp_path / "train.csv")
        rows = find_suspects(tmp_path / "scores.parquet", tmp_path / "config.yaml").rows
        verdicts.append(rows.filter(pl.col("id") == row["id"][0]).row(0, named=True))
    conflict = "another label in 1 of 1 rows with the same texts: 999"
    assert conflict in verdicts[0]["reasons"]
    assert not [reason for reason in verdicts[1]["reasons"] if "another label" in reason]
    assert verdicts[0]["p_wrong"] > verdicts[1]["p_wrong"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.booleans()), min_size=1, max_size=30))
def test_reasons_are_those_of_comparing_every_two_rows(rows: list[tuple[int, int, bool]]) -> None:
    texts, labels, exchanged = map(np.array, zip(*rows, strict=True))
    group, swapped = texts // 3, np.array(LMSYS.swapped_columns)
    common = SimpleNamespace(ids=[f"r{row}" for row in range(len(rows))], targets=np.eye(3)[labels], task=LMSYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pairclf.runs.suspects._same", lambda common, threshold: (texts, exchanged))
        reasons = other_labels(common, (group, exchanged))  # type: ignore[arg-type]
    upright = np.where(exchanged, swapped[labels], labels)
    for row, words in enumerate(reasons):
        expected = []
        for alike, name in ((texts == texts[row], "the same texts"), (texts != texts[row], "nearly the same texts")):
            alike &= (group == group[row]) & (np.arange(len(rows)) != row)
            against = {f"r{other}" for other in np.flatnonzero(alike & (upright != upright[row]))}
            if against:
                expected.append((f"another label in {len(against)} of {alike.sum()} rows with {name}", against))
        assert [word.split(": ")[0] for word in words] == [sentence for sentence, _ in expected]
        for word, (_, against) in zip(words, expected, strict=True):
            *named, last = word.split(": ")[1].split(", ")
            assert {*named, last} - {"..."} <= against
            assert len(named) + (last != "...") == min(IDS, len(against))


def spoiled(scores: pl.DataFrame, how: str) -> pl.DataFrame:
    a, b, tie = LMSYS.classes
    changes: dict[str, Callable[[], pl.DataFrame]] = {
        "sum": lambda: scores.with_columns(pl.lit(0.9).alias(tie)),
        "nan": lambda: scores.with_columns(pl.lit(float("nan")).alias(tie)),
        "twice": lambda: pl.concat([scores, scores[:1]]),
        "missing id": lambda: scores.with_columns(id=pl.when(pl.int_range(pl.len()) > 0).then("id")),
        "class": lambda: scores.rename({tie: "draw"}),
        "equal": lambda: scores.with_columns(pl.lit(1 / 3).alias(name) for name in LMSYS.classes),
        "seen": lambda: scores.with_columns(seen=pl.lit(1, dtype=pl.UInt16)),
        "mirrored": lambda: scores.rename({a: b, b: a}),
    }
    return changes[how]()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("sum", DataError, "do not sum to one"),
        ("nan", DataError, "are no finite numbers"),
        ("twice", DataError, "stand twice"),
        ("missing id", DataError, "ids that are empty"),
        ("class", DataError, "are missing; the file has"),
        ("equal", DataError, "know no more than the class prior"),
        ("mirrored", DataError, "know no more than the class prior"),
        ("seen", LeakError, "were trained on the prompts"),
    ],
)
def test_scores_that_can_t_tell_are_refused(
    arms: Path, scores: pl.DataFrame, tmp_path: Path, how: str, error: type[Exception], message: str
) -> None:
    spoiled(scores, how).write_parquet(tmp_path / "scores.parquet")
    with pytest.raises(error, match=message):
        find_suspects(tmp_path / "scores.parquet", arms / "plain.yaml")


def test_classes_are_matched_by_name_and_ten_rows_are_enough(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    scores.select("id", *reversed(LMSYS.classes)).write_csv(tmp_path / "by-hand.csv")
    by_hand, own = (
        find_suspects(path, arms / "strong.yaml") for path in (tmp_path / "by-hand.csv", arms / "strong.yaml")
    )
    assert by_hand.rows["id"].equals(own.rows["id"])
    assert by_hand.rows["p_wrong"].to_numpy() == pytest.approx(own.rows["p_wrong"].to_numpy(), abs=1e-6)
    chosen = own.rows.head(10)
    sure = [pl.when(pl.col("label") == name).then(0.8).otherwise(0.1).alias(name) for name in LMSYS.classes]
    chosen.with_columns(sure).write_parquet(tmp_path / "ten.parquet")
    assert len(find_suspects(tmp_path / "ten.parquet", arms / "plain.yaml").rows) == 10


def test_next_command_of_a_run_names_the_config_that_it_keeps(arms: Path, tmp_path: Path) -> None:
    run = arms / "runs" / "strong"
    config = load_config(run / "fold0" / "config.yaml")
    words = shlex.split(next_command(run, None, tmp_path / "s.parquet", config))
    assert words[2] == str(run / "fold0" / "config.yaml")
    assert words[4] == f"output_dir={output_of(config)}-soft-labels"


@pytest.mark.parametrize("name", ["a b", "it's", "[x]", "a: b", "#1", "a #b", "*x", "$x`y`", "{a}", "a, b", '"q"', "Ä"])
def test_the_next_command_names_any_file(arms: Path, tmp_path: Path, name: str) -> None:
    config, out = load_config(arms / "plain.yaml"), tmp_path / f"{name}.parquet"
    words = shlex.split(next_command(arms / "plain.yaml", None, out, config))
    again = load_config(Path(words[2]), words[3:])
    assert again.data.soft_label_file is not None
    assert again.data.soft_label_file.resolve() == out


def test_files_of_soft_labels_are_checked(arms: Path, written: Path, tmp_path: Path) -> None:
    def sides(frame: pl.DataFrame) -> object:
        frame.write_parquet(tmp_path / "labels.parquet")
        config = load_config(arms / "plain.yaml")
        name = config.data.name_of(tmp_path / "labels.parquet")
        return Run(load_config(arms / "plain.yaml", [f"data.soft_labels={name}"])).split(0)

    frame = pl.read_parquet(written)
    with pytest.raises(LeakError, match="do not say whether their models"):
        sides(frame.drop("seen"))
    with pytest.raises(LeakError, match="come from models that were trained on the very row"):
        sides(frame.with_columns(seen=pl.lit(2, dtype=pl.UInt16)))
    with pytest.raises(DataError, match="none of the 148 training rows is in the file"):
        sides(frame.with_columns(id="x" + pl.col("id")))
    with pytest.raises(DataError, match="do not sum to one"):
        sides(frame.with_columns(winner_tie=pl.lit(0.9)))
    training = sides(frame.head(3))[0]  # type: ignore[index]
    assert (targets_of(training).max(axis=1) < 1).sum() <= 3, "the other rows keep their labels"
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        Run(load_config(arms / "plain.yaml", ["data.soft_labels=nowhere.parquet"])).split(0)


def test_the_file_of_scores_is_not_overwritten(arms: Path, scores: pl.DataFrame, cli: Cli, tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.parquet", scores)
    path = tmp_path / "scores.parquet"
    code, text = cli("suspects", path, "--config", arms / "plain.yaml", "--out", path)
    assert code == 2
    assert "is the file of scores that is read" in text
    assert read_scores(path, LMSYS).equals(scores)


def test_several_labels_a_row_are_refused(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    labels = "{name: t, fields: [text], classes: [x, y], multi_label: true}"
    pl.DataFrame({"id": ["1", "2"], "text": ["a", "b"], "x": [1, 0], "y": [1, 1]}).write_csv(tmp_path / "train.csv")
    (tmp_path / "c.yaml").write_text(
        f"task: {labels}\napproach: classical\n"
        f"data: {{folder: {tmp_path}, train: [train.csv]}}\noutput_dir: {tmp_path}/run\n"
    )
    pl.DataFrame({"id": ["1", "2"], "x": [0.5, 0.5], "y": [0.5, 0.5]}).write_csv(tmp_path / "scores.csv")
    with pytest.raises(ConfigError, match="several labels a row"):
        find_suspects(tmp_path / "scores.csv", tmp_path / "c.yaml")
