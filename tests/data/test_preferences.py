"""Public preference sets: files with their schemas become rows of a task, and `check` says which set a file is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from pairclf.cli import app
from pairclf.config import Rules, Source, resolve
from pairclf.config.data import Format
from pairclf.data.audit import clean
from pairclf.data.formats import Flaw
from pairclf.data.messages import conversation
from pairclf.data.preferences import FORMATS, recognise
from pairclf.data.rows import read_rows, scan_rows
from pairclf.errors import DataError
from pairclf.task import LMSYS, WSDM, Task

Record = dict[str, Any]


def say(role: str | None, content: Any) -> Record:
    return {"role": role, "content": content}


def parts(*texts: str) -> list[Record]:
    return [{"type": "text", "text": text, "image": None, "mimeType": None} for text in texts]


def talk(question: Any, answer: Any) -> list[Record]:
    return [say("user", question), say("assistant", answer)]


def arena_140k(winner: str, row: int) -> Record:
    """The columns of the set's card; `full_conversation` and `conv_metadata` hold more than stands here."""
    sides = [talk(parts(f"question {row}"), parts(f"answer {side} {row}")) for side in "ab"]
    user, a, b = sides[0][0], sides[0][1], sides[1][1]
    return {
        "id": f"c4b9710c-{row}",
        "model_a": "x",
        "model_b": "y",
        "winner": winner,
        "evaluation_session_id": f"session {row // 2}",
        "evaluation_order": row % 2 + 1,
        "conversation_a": sides[0],
        "conversation_b": sides[1],
        "full_conversation": [{"user": user, "model_side_a": a, "model_side_b": b}],
        "conv_metadata": {"sum_assistant_a_tokens": 7, "bold_count_a": {"**": 1, "__": 0}},
        "category_tag": {"math_v0.1": {"math": False}},
        "language": "en",
        "is_code": False,
        "timestamp": "2025-04-17",
    }


def arena_100k(winner: str, row: int) -> Record:
    return {
        "question_id": f"00{row}",
        "model_a": "x",
        "model_b": "y",
        "winner": winner,
        "conversation_a": talk(f"question {row}", f"answer a {row}"),
        "conversation_b": talk(f"question {row}", f"answer b {row}"),
        "turn": 1,
        "language": "English",
        "tstamp": 1718100000.5,
        "conv_metadata": {"sum_user_tokens": 3},
        "is_code": False,
        "is_refusal": False,
        "dedup_tag": {"high_freq": False, "sampled": True},
        "judge_hash": "a1",
    }


def arena_33k(winner: str, row: int) -> Record:
    kept = ("question_id", "model_a", "model_b", "winner", "conversation_a", "conversation_b", "turn", "language")
    more = {"judge": "arena_user_1", "anony": True, "openai_moderation": {"flagged": False}, "toxic_chat_tag": None}
    return {name: cell for name, cell in arena_100k(winner, row).items() if name in kept} | more


def helpsteer3(scores: list[int], row: int) -> Record:
    return {
        "domain": "general",
        "language": "english",
        "context": [*talk("hello", "hi"), say("user", f"question {row}")],
        "response1": f"answer a {row}",
        "response2": f"answer b {row}",
        "overall_preference": round(float(np.mean(scores))),
        "individual_preference": [
            {"score": score, "reasoning": "because", "feedback1": None, "feedback2": None} for score in scores
        ],
    }


def helpsteer2(scores: list[int], row: int) -> Record:
    return {
        "split": "train",
        "prompt": f"hello\n<extra_id_1>Assistant\nhi\n<extra_id_1>User\nquestion {row}",
        "response_1": f"answer a {row}",
        "response_2": f"answer b {row}",
        "preference_strength": round(float(np.mean([score for score in scores if abs(score) <= 3]))),
        "preference_statement": "",
        "preference_elaboration": "",
        "three_most_similar_preferences": [],
        "all_preferences_unprocessed": [
            {"strength": score, "justification": "because", "elaboration": ""} for score in scores
        ],
    }


def ultrafeedback(scores: tuple[float, float], row: int) -> Record:
    chosen, rejected = (talk(f"question {row}", f"{word} {row}") for word in ("good", "bad"))
    return {
        "prompt": f"question {row}",
        "prompt_id": "ab" * 32,
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: question {row}\n\nAssistant: {word} {row}"

FILES: dict[str, tuple[str, list[Record], list[Any]]] = {
    "arena-140k": (
        "arena-140k",
        [arena_140k(winner, row) for row, winner in enumerate(["model_a", "model_b", "tie", "both_bad"])],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]],
    ),
    "arena-100k": (
        "arena-100k",
        [arena_100k(winner, row) for row, winner in enumerate(["model_a", "model_b", "tie", "tie (bothbad)"])],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]],
    ),
    "arena-33k": (
        "chatbot-arena-33k",
        [arena_33k("tie (bothbad)", 0), arena_33k("model_b", 1)],
        [[0, 0, 1], [0, 1, 0]],
    ),
    "helpsteer3": (
        "helpsteer3",
        [helpsteer3([-2, -2], 0), helpsteer3([0, 2], 1)],
        [[0.880797, 0.119203, 0], [0.059602, 0.440399, 0.5]],
    ),
    "helpsteer2": (
        "helpsteer2",
        [helpsteer2([-1, -100, -1], 0), helpsteer2([3, -3], 1)],
        [[0.731059, 0.268941, 0], [0.5, 0.5, 0]],
    ),
    "ultrafeedback": (
        "ultrafeedback",
        [ultrafeedback((8.5, 7.5), 0), ultrafeedback((5.0, 5.0), 1), ultrafeedback((9.0, 1.0), 2)],
        [0.731059, "tie", 0.999665],
    ),
    "trl": (
        "chosen-rejected",
        [
            {"prompt": [say("user", "question 0")], "chosen": talk(0, "good 0")[1:], "rejected": talk(0, "bad 0")[1:]},
            {"prompt": [say("user", "question 1")], "chosen": talk(0, "good 1")[1:], "rejected": talk(0, "bad 1")[1:]},
        ],
        [1.0, 1.0],
    ),
    "hh-rlhf": (
        "chosen-rejected",
        [{"chosen": HH.format(word="good", row=row), "rejected": HH.format(word="bad", row=row)} for row in range(2)],
        [1.0, 1.0],
    ),
}
"""`{name: (format, rows, labels)}`; a number instead of a label is the probability of the chosen side."""


def write(path: Path, rows: list[Record]) -> Path:
    """JSONL as it is, parquet with the types that pyarrow gives, CSV with lists and objects as JSON."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    else:
        flat = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]
        pl.DataFrame(flat).write_csv(path)
    return path


def read(path: Path, name: str, task: Task = LMSYS, **settings: Any) -> pl.DataFrame:
    return read_rows([Source(files=[path], format=name, **settings)], task, labelled=True)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_every_format_has_a_name_in_the_config_and_a_file_here() -> None:
    assert list(get_args(Format)) == list(FORMATS)
    assert {name for name, _, _ in FILES.values()} == {*FORMATS}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("name", FILES)
def test_rows_of_a_set_are_those_of_the_task(tmp_path: Path, name: str, suffix: str) -> None:
    kind, rows, labels = FILES[name]
    path = write(tmp_path / f"set{suffix}", rows)
    assert recognise([*rows[0]]) == kind
    table = read(path, kind)
    assert table["flaws"].to_list() == [0] * len(rows)
    for at, (row, label) in enumerate(zip(table.iter_rows(named=True), labels, strict=True)):
        assert row["prompt"][-1] == f"question {at}"
        words = (row["response_a"][-1], row["response_b"][-1])
        if isinstance(label, list):
            assert words == (f"answer a {at}", f"answer b {at}")
            assert row["target"] == pytest.approx(label, abs=1e-6)
        else:
            assert {*words} == {f"good {at}", f"bad {at}"}
            chosen = row["target"][words.index(f"good {at}")]
            assert (row["target"] == [0, 0, 1]) if label == "tie" else (chosen == pytest.approx(label, abs=1e-6))
    earlier = [turns[:-1] for turns in table["prompt"].to_list()]
    assert earlier == [["hello"] if name in ("helpsteer2", "helpsteer3", "hh-rlhf") else []] * len(rows)


@pytest.mark.parametrize("name", FILES)
def test_the_entry_that_check_prints_works_and_so_does_convert(tmp_path: Path, name: str) -> None:
    kind, rows, _ = FILES[name]
    path = write(tmp_path / "set.parquet", rows)
    code, shown = invoke("check", path, "--out", tmp_path / "audit.json")
    assert code == 0, shown
    assert f"looks like {kind} ({FORMATS[kind].page})" in shown
    pasted = yaml.safe_load(shown[shown.index("data:\n") : shown.index("}\n") + 2])
    config = resolve({"task": "lmsys", **pasted})
    table = read_rows(config.data.sources, config.task, labelled=True)
    assert table["id"].str.starts_with(f"{kind}-").all()
    code, shown = invoke("convert", path, "--to", tmp_path / "out.jsonl")
    assert code == 0, shown
    converted = read_rows([tmp_path / "out.jsonl"], LMSYS, labelled=True)
    columns = ["id", *LMSYS.fields, "target"]
    assert (
        converted.select(columns).to_dicts()
        == clean(table, LMSYS, Rules(), labelled=True)[0].select(columns).to_dicts()
    )
    assert invoke("check", tmp_path / "out.jsonl", "--out", tmp_path / "audit.json")[0] == 0


def test_check_names_the_task_of_a_file_that_has_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pl.DataFrame({"id": ["1"], **{name: ["x"] for name in WSDM.fields}, "winner": ["model_a"]}).write_parquet(path)
    refused = CliRunner().invoke(app, ["check", str(path), "--out", str(tmp_path / "audit.json")])
    assert isinstance(refused.exception, DataError)
    assert "train.parquet has the columns of --task wsdm" in refused.output
    code, shown = invoke("check", path, "--task", "wsdm", "--out", tmp_path / "audit.json")
    assert (code, "has the columns of" in shown) == (0, False)


def test_sides_are_drawn_by_id_and_do_not_tell_the_winner(tmp_path: Path) -> None:
    rows = [{"id": f"r{row}", "prompt": "q", "chosen": f"good {row}", "rejected": f"bad {row}"} for row in range(400)]
    table = read(write(tmp_path / "set.jsonl", rows), "chosen-rejected")
    first = np.array([label[0] for label in table["target"]])
    assert 160 < first.sum() < 240  # four standard deviations of a fair coin
    assert {(text.split()[0], won) for (text,), won in zip(table["response_a"], first, strict=True)} == {
        ("good", 1.0),
        ("bad", 0.0),
    }
    backwards = read(write(tmp_path / "back.jsonl", rows[::-1]), "chosen-rejected")
    columns = ["id", "response_a", "response_b", "target"]
    assert backwards.sort("id").select(columns).equals(table.sort("id").select(columns))


def test_chunks_number_and_draw_the_rows_like_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", [ultrafeedback((8.0, 7.0), row) for row in range(20)])
    source = Source(files=[path, path], format="ultrafeedback")
    whole = read_rows([source], LMSYS, labelled=True)
    assert whole["id"].to_list() == [str(number) for number in range(1, 41)]
    assert pl.concat(scan_rows([source], LMSYS, labelled=True, size=3)).equals(whole)


def test_a_tie_is_half_a_win_for_either_side_where_the_task_has_none(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", FILES["arena-140k"][1])
    assert read(path, "arena-140k", WSDM)["target"].to_list() == [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]


def test_margins_are_softer_with_a_larger_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [ultrafeedback((9.0, 7.0), 0)])
    highest = [max(read(path, "ultrafeedback", margin_scale=scale)["target"][0]) for scale in (1e-3, 1.0, 4.0)]
    assert highest == pytest.approx([1.0, 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-0.5))])


def test_groups_and_weights_of_the_file_are_kept(tmp_path: Path) -> None:
    rows = [arena_140k("tie", row) | {"votes": row + 1} for row in range(3)]
    path = write(tmp_path / "set.parquet", rows)
    source = Source(files=[path], format="arena-140k", columns={"weight": "votes"})
    table = read_rows([source], LMSYS, labelled=True, group="evaluation_session_id")
    assert table["group"].to_list() == ["session 0", "session 0", "session 1"]
    assert table["weight"].to_list() == [1.0, 2.0, 3.0]


URL = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
HOSTILE: dict[str, tuple[list[Record], list[str | None], list[str | None], bool]] = {
    "system": ([say("system", "s"), *talk("q", "a")], ["[system]\ns\n\n[user]\nq"], ["a"], True),
    "tool": (
        [say("user", "q"), CALL, say("tool", "42")],
        ["q"],
        ['[assistant]\n[tool call]\n[{"name": "f"}]\n\n[tool]\n42'],
        True,
    ),
    "no content": (talk(None, None), [None], [None], True),
    "image": (talk([*parts("look"), URL], "a"), ["look\n[image]"], ["a"], True),
    "unknown role": (
        [say("user", "q"), say("narrator", "n"), say("assistant", "a")],
        ["[user]\nq\n\n[narrator]\nn"],
        ["a"],
        False,
    ),
    "no role": ([*talk("q", "a"), say(None, "x")], ["q"], ["[assistant]\na\n\n[None]\nx"], False),
    "number": (talk("q", [7]), ["q"], ["7"], False),
    "answer first": ([say("assistant", "a"), *talk("q", "b")], [None, "q"], ["a", "b"], True),
    "no answer": ([say("user", "q")], ["q"], [], True),
    "two in a row": ([say("user", "q"), say("user", "r"), say("Assistant", "a")], ["q\n\nr"], ["a"], True),
    "sharegpt": ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], ["q"], ["a"], True),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_turns_of_a_conversation(name: str) -> None:
    messages, asked, answered, sound = HOSTILE[name]
    result = conversation(messages)
    assert (result.asked, result.answered, result.sound) == (asked, answered, sound)


def test_what_is_odd_in_a_set_is_found_by_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = [*parts("look"), {"type": "image", "text": None, "image": "x", "mimeType": "image/png"}]
    rows = [
        arena_140k("nobody", 0),
        arena_140k("model_a", 1) | {"conversation_b": talk(parts("another question"), parts("b"))},
        arena_140k("model_a", 2) | {"conversation_a": [], "conversation_b": None},
        arena_140k("tie", 3) | {"conversation_a": talk(image, parts("\ud83d")), "conversation_b": talk(image, None)},
        arena_140k("model_b", 4) | {"conversation_a": "[{'role': 'user', 'content': 'a repr'}]"},
    ]
    table = read(write(tmp_path / "set.jsonl", rows), "arena-140k")
    bits = [Flaw(bits) for bits in table["flaws"]]
    assert bits[0] == Flaw.BAD_LABEL
    assert bits[1] == Flaw.UNDECODABLE
    assert Flaw.NULL_LIST in bits[2] or Flaw.MISSING_CELL in bits[2]
    assert Flaw.SURROGATE in bits[3]
    assert Flaw.UNDECODABLE in bits[4]  # a list as Python prints it is no JSON, and is never evaluated
    assert table["prompt"].to_list()[3] == ["look\n[image]"]
    said = capsys.readouterr().err
    assert "['nobody'] name no winner; the labels are model_a, model_b, tie, both_bad, tie (bothbad)" in said
    assert "2 parts of type 'image' in messages: read as [image]" in said
    assert "the sides of 2 rows follow different questions" in said


def test_a_question_about_a_dialogue_is_one_turn(tmp_path: Path) -> None:
    asked = "Go on:\n\nHuman: hi\n\nAssistant:"
    path = write(tmp_path / "set.jsonl", [{"prompt": asked, "chosen": f"a. {asked}", "rejected": "b"}])
    table = read(path, "chosen-rejected")
    assert table["prompt"].to_list() == [[asked]]
    assert [f"a. {asked}"] in [table["response_a"][0].to_list(), table["response_b"][0].to_list()]


def test_an_answer_that_is_a_dialogue_is_no_transcript(tmp_path: Path) -> None:
    """Only where the file has no prompt, or the text begins with it, does a named user ask something."""
    scene = "Human: Is it late?\n\nAssistant: It is."
    path = write(tmp_path / "set.jsonl", [{"prompt": "Write a scene.", "chosen": scene, "rejected": "No."}])
    table = read(path, "chosen-rejected")
    assert table["prompt"].to_list() == [["Write a scene."]]
    assert [scene] in [table["response_a"][0].to_list(), table["response_b"][0].to_list()]
    asked = "\n\nHuman: hi\n\nAssistant:"
    path = write(tmp_path / "whole.jsonl", [{"prompt": asked, "chosen": f"{asked} yes", "rejected": f"{asked} no"}])
    whole = read(path, "chosen-rejected")
    assert whole["prompt"].to_list() == [["hi"]]
    assert sorted([whole["response_a"][0].to_list(), whole["response_b"][0].to_list()]) == [["no"], ["yes"]]


@pytest.mark.parametrize("text", [str(talk("hi", "yes")), json.dumps(talk("hi", "yes"))[:-9]], ids=["Python", "cut"])
def test_messages_that_are_no_json_are_undecodable(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "set.jsonl", [{"prompt": "hi", "chosen": text, "rejected": "no"}])
    assert read(path, "chosen-rejected")["flaws"].to_list() == [Flaw.UNDECODABLE]
    assert (
        read(write(path, [{"prompt": "hi", "chosen": "[{x}]", "rejected": "no"}]), "chosen-rejected")["flaws"][0] == 0
    )


def test_a_margin_that_stands_for_no_verdict_is_no_label(tmp_path: Path) -> None:
    rows = [helpsteer3([-3], 0) | {"overall_preference": -100, "individual_preference": None}]
    assert read(write(tmp_path / "set.jsonl", rows), "helpsteer3")["target"].to_list() == [None]


def test_a_chosen_side_that_is_worse_has_no_label(tmp_path: Path) -> None:
    rows = [ultrafeedback((3.0, 7.0), 0), ultrafeedback((math.nan, 7.0), 1), ultrafeedback((7.0, 3.0), 2)]
    targets = read(write(tmp_path / "set.parquet", rows), "ultrafeedback")["target"].to_list()
    assert targets[0] is None
    assert sorted(targets[1]) == [0.0, 0.0, 1.0]


def test_equal_sides_with_a_winner_are_for_the_rule(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"prompt": "q", "chosen": "same", "rejected": "same"}])
    rules = Rules(identical_with_winner="fix")
    table, _ = clean(read(path, "chosen-rejected"), LMSYS, rules, labelled=True)
    assert table["target"].to_list() == [[0.5, 0.5, 0.0]]


TOPICS = Task(name="topics", fields=("text",), classes=("0", "1"), label_column="y")
PAIR = [ultrafeedback((2.0, 1.0), 0)]
REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "of another set": ("looks like format: ultrafeedback", lambda path: read(write(path, PAIR), "arena-140k")),
    "of a task without sides": ("has no two sides", lambda path: read(write(path, PAIR), "ultrafeedback", TOPICS)),
    "without the mapped column": (
        "needs the columns ['votes']",
        lambda path: read(write(path, PAIR), "ultrafeedback", columns={"weight": "votes"}),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_such_set_is_refused(tmp_path: Path, name: str) -> None:
    words, act = REFUSED[name]
    with pytest.raises(DataError) as caught:
        act(tmp_path / "set.jsonl")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "arena-140k", "columns": {"prompt": "q"}}, "here ['prompt']"),
        ({"format": "arena-140k", "labels": {"tie": "winner_tie"}}, "remove label_column, labels"),
        ({"margin_scale": 2.0}, "for files of a `format`"),
        ({"format": "arena-150k"}, "arena-140k"),
    ],
)
def test_settings_that_a_format_overrules_are_refused(settings: Record, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Source(files=["x"], **settings)
    assert words in str(caught.value)


CONTENT = (
    st.none() | st.text(max_size=6) | st.lists(st.none() | st.text(max_size=6).map(lambda t: parts(t)[0]), max_size=3)
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool", "critic", ""]), CONTENT), max_size=8))
def test_no_text_of_a_conversation_is_lost(spoken: list[tuple[str, Any]]) -> None:
    """Answers never outnumber questions, and a conversation of known roles is sound."""
    result = conversation([say(role, content) for role, content in spoken])
    assert len(result.answered) <= len(result.asked) <= len(result.answered) + 1
    texts = "\n".join(turn for turn in (*result.asked, *result.answered) if turn)
    for _, content in spoken:
        for part in content if isinstance(content, list) else [content]:
            text = part["text"] if isinstance(part, dict) else part
            assert text is None or text in texts
    assert result.sound == all(role in ("user", "assistant", "system", "tool") for role, _ in spoken)
