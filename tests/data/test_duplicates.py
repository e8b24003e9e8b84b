"""Near-duplicates: found at and above the threshold, never below it, whatever else is searched, in any script."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import canonical

from pairclf.data.duplicates import (
    RECALL,
    SHINGLE,
    NearIndex,
    _bands,
    clusters,
    near_overlap,
    normalised_prompts,
    same_rows,
    shingles,
)
from pairclf.data.formats import CONTROL
from pairclf.task import LMSYS, Task

WORDS = [
    one + other for one in ("sea", "moon", "fire", "glass", "iron", "cloud") for other in ("bird", "way", "kin", "log")
]


def normal(*prompts: str) -> list[str]:
    return normalised_prompts(canonical(prompts), LMSYS).to_list()


def some_words(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def plain_jaccard(one: str, other: str) -> float:
    """As the textbook has it, over sets of texts."""
    a, b = ({text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)} for text in (one, other))
    return len(a & b) / len(a | b) if a and b else 0.0


def plain_clusters(prompts: list[str], threshold: float) -> list[int]:
    """Every pair compared, labels spread until nothing changes."""
    firsts = list(range(len(prompts)))
    changed = True
    while changed:
        changed = False
        for one in range(len(prompts)):
            for other in range(one):
                if plain_jaccard(prompts[one], prompts[other]) >= threshold and firsts[one] != firsts[other]:
                    firsts[one] = firsts[other] = min(firsts[one], firsts[other])
                    changed = True
    return firsts


# --- the normal form -------------------------------------------------------------------------------------------------


@given(st.text(max_size=30))
@settings(deadline=None)
def test_the_normal_form_is_one_and_ignores_case_and_space(text: str) -> None:
    (once,) = normal(text)
    assert normal(f" \n{text}\t ", once) == [once] * 2
    if text.isascii():
        assert normal(text.upper(), text.replace(" ", " \t")) == [once] * 2
    assert once == once.strip(" \t\n\r")
    assert not any(blank in once for blank in ("  ", "\t", "\n", "\r", "\u00a0", "\u3000"))


@given(st.text(max_size=30))
@settings(deadline=None)
def test_the_normal_form_is_that_of_unicode(text: str) -> None:
    plain = re.sub(CONTROL, "", unicodedata.normalize("NFKC", text))
    assert normal(text)[0] == " ".join(plain.lower().replace("ß", "ss").replace("ς", "σ").split())


def test_fields_that_stay_make_the_prompt() -> None:
    frame = canonical([["What is\n it?"], ["What is", None, "it?"], [], [None], [""], [" \n"]])
    assert normalised_prompts(frame, LMSYS).to_list() == ["what is it?"] * 2 + [""] * 4
    two = Task(
        name="two",
        fields=("prompt", "context", "l", "r"),
        classes=("x", "y"),
        swap_fields=("l", "r"),
        swap_classes=("x", "y"),
    )
    columns = {"id": ["1"], "prompt": [["P"]], "context": [["C "]], "l": [["l"]], "r": [["r"]]}
    assert normalised_prompts(pl.DataFrame(columns), two).to_list() == ["p\nc"]


def test_a_pair_and_its_mirror_are_equal_where_a_swap_moves_every_field() -> None:
    task = Task(name="pair", fields=("a", "b"), classes=("l", "r"), swap_fields=("a", "b"), swap_classes=("l", "r"))
    frame = pl.DataFrame({"id": ["1", "2", "3"], "a": [["X "], ["y"], [""]], "b": [["y"], ["x"], [""]]})
    assert normalised_prompts(frame, task).to_list() == ["x\ny", "x\ny", ""]


# --- shingles and their index ----------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.text(max_size=60))
@settings(deadline=None)
def test_shingles_are_as_many_as_there_are_different_texts(one: str, other: str) -> None:
    texts = [{text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)} for text in (one, other)]
    hashes = [shingles(text) for text in (one, other)]
    assert [len(found) for found in hashes] == [len(found) for found in texts]
    assert len(np.intersect1d(*hashes)) == len(texts[0] & texts[1])


def test_the_bands_keep_their_promise() -> None:
    for threshold in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0):
        bands, rows = _bands(threshold)
        assert 1 - (1 - threshold**rows) ** bands >= RECALL
        assert bands * rows <= 128
    assert _bands(0.8) == (25, 5)
    assert _bands(0.001) == (128, 1)


long = st.lists(st.sampled_from(WORDS), min_size=8, max_size=14).map(" ".join)


@st.composite
def families(draw: st.DrawFn) -> list[str]:
    """Prompts and close variants of them, in any order, all different."""
    found = set()
    for base in draw(st.lists(long, min_size=1, max_size=4)):
        found.add(base)
        for _ in range(draw(st.integers(0, 3))):
            words = base.split()
            words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(WORDS))
            found.add(" ".join(words))
    return draw(st.permutations(sorted(found)))


@given(families(), st.sampled_from([0.6, 0.8, 0.9]))
@settings(deadline=None, derandomize=True)  # one pair in 20,000 may be missed
def test_clusters_are_those_of_all_pairs(prompts: list[str], threshold: float) -> None:
    assert clusters(prompts, threshold).tolist() == plain_clusters(prompts, threshold)


def test_the_threshold_itself_is_near_and_what_is_below_is_not() -> None:
    base, more = "abcdefghijkl", "abcdefghijklmn"  # 8 shingles, and two more: 8 / 10
    assert plain_jaccard(base, more) == 0.8
    assert clusters([base, more], 0.8).tolist() == [0, 0]
    assert clusters([base, more], 0.81).tolist() == [0, 1]
    assert clusters([base, more], None).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["word", "end", "start"])
def test_planted_near_duplicates_are_found(kind: str) -> None:
    """A word changed in sixty, punctuation at the end, a greeting before it: 200 of 200."""
    originals = [some_words(60, seed) for seed in range(200)]
    changed = {
        "word": [[*words[:30], "zeppelin", *words[31:]] for words in originals],
        "end": [[*words, "!!!"] for words in originals],
        "start": [["hello,", *words] for words in originals],
    }[kind]
    prompts = [" ".join(words) for words in [*originals, *changed]]
    assert clusters(prompts, 0.8).tolist() == [*range(200), *range(200)]


@pytest.mark.parametrize(
    "text",
    [
        "請用三句話解釋量子糾纏是什麼，並給出一個日常生活中的比喻，讓一個十歲的孩子也能聽得懂。",
        "Объясни, пожалуйста, чем отличается список от кортежа в языке Python, и приведи пример.",
        "اشرح لي من فضلك الفرق بين القائمة والصف في لغة البرمجة بايثون مع مثال قصير وواضح.",
        "양자 얽힘이 무엇인지 세 문장으로 설명하고 일상 생활의 비유를 하나 들어 주세요. 쉽게 부탁해요.",
        "🙂🙃 emoji galore 🎉🎉 what do these mean: 🐙🦑🦐🦞🦀 and 🍎🍏🍐🍊🍋 thank you",
    ],
)
def test_scripts_and_forms(text: str) -> None:
    forms = normal(text, unicodedata.normalize("NFD", text), text.upper(), f"  {text}\n", text + " ?!", "𝐖hat is this?")
    assert len(set(forms[:4])) == 1
    assert clusters([forms[0], forms[4], forms[5]], 0.8).tolist() == [0, 0, 2]


def test_far_and_short_prompts_stay_apart() -> None:
    prompts = normal("What is 2+2?", "Who wrote Hamlet?", "hi", "hi!", "hey", "a", "你好", "你好吗", "what is 2+2? ")
    firsts = clusters(list(dict.fromkeys(prompts)), 0.8)
    assert firsts.tolist() == list(range(8))
    assert clusters([], 0.8).tolist() == []


def test_near_names_one_prompt_a_label() -> None:
    prompts = [" ".join([*some_words(30), end]) for end in ("one", "two", "three", "four")]
    index, labels = NearIndex.of(prompts, 0.8), np.array([0, 1, 1, -1])
    assert sorted(labels[index.near(3, labels)].tolist()) == [0, 1]
    assert index.near(0, labels).tolist() == []
    assert index.near(3, np.array([0, -1, -1, -1])).tolist() == [0]


@pytest.mark.parametrize("count", [2_000, pytest.param(5_000, marks=pytest.mark.thorough)])
def test_near_index_compares_thousands_of_near_duplicates_few_times(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A template with so many fillings: millions of pairs, and a handful of comparisons for each prompt."""
    compared = calls = 0
    alike = NearIndex._alike

    def counted(index: NearIndex, place: int, others: np.ndarray) -> np.ndarray:
        nonlocal compared, calls
        compared, calls = compared + len(others), calls + 1
        return alike(index, place, others)

    monkeypatch.setattr(NearIndex, "_alike", counted)
    template = " ".join(some_words(40))
    index = NearIndex.of([f"{template} {number}" for number in range(count)], 0.8)
    labels = np.zeros(count, dtype=np.int64)
    assert all(len(met) for place, met in index.walk(labels) if place)
    assert compared < 10 * count
    compared = calls = 0
    assert set(clusters([f"question {number}" for number in range(count)], 0.8)) > {0}
    assert compared < 0.12 * count**2, "short prompts look alike far more often than they are: a quarter of all pairs"
    assert calls < 14 * count


def test_long_prompts() -> None:
    """A book with a page before it: no sketch may hang on where a text starts."""
    book = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=60_000))
    assert clusters([book, "x" * 60_000, "preface " * 100 + book], 0.8).tolist() == [0, 1, 0]


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_overlap_is_equal_or_near() -> None:
    text = " ".join(some_words(60))
    seen = canonical([[text], ["What is 2+2?"], [""], ["who are you"]])
    frame = canonical(
        [[f"{text.upper()}!"], ["what is  2+2?"], [""], ["Who wrote Hamlet?"], [None], [text], [f"{text}!"]]
    )
    assert near_overlap(frame, seen, LMSYS, 0.8).to_list() == [True, True, False, False, False, True, True]
    assert near_overlap(frame, seen, LMSYS, None).to_list() == [False, True, False, False, False, True, False]
    assert near_overlap(frame, seen.clear(), LMSYS, 0.8).to_list() == [False] * 7
    assert near_overlap(frame.clear(), seen, LMSYS, 0.8).dtype == pl.Boolean


@given(families(), families())
@settings(deadline=None, derandomize=True)
def test_overlap_hangs_on_pairs_alone(one: list[str], other: list[str]) -> None:
    expected = [any(plain_jaccard(text, known) >= 0.8 or text == known for known in other) for text in one]
    frame, seen = (canonical(texts) for texts in (one, other))
    assert near_overlap(frame, seen, LMSYS, 0.8).to_list() == expected


def test_the_same_in_every_process() -> None:
    code = (
        "from pairclf.data.duplicates import clusters, shingles\n"
        "prompts = [' '.join(str(i * j % 97) for j in range(40 + i % 3)) for i in range(60)]\n"
        "print(clusters(prompts, 0.5).tolist(), shingles('ünï çødé')[0])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "77")
    }
    assert len(said) == 1


# --- whole rows ------------------------------------------------------------------------------------------------------


def pairs_of(*rows: tuple[str, str, str]) -> pl.DataFrame:
    texts = {name: [[row[place]] for row in rows] for place, name in enumerate(LMSYS.fields)}
    return canonical([row[0] for row in rows]).with_columns(**{name: pl.Series(texts[name]) for name in texts})


def test_rows_are_the_same_in_either_order_and_field_by_field() -> None:
    long = [" ".join(some_words(40, seed)) for seed in range(4)]
    prompt, a, b, c = long
    rows = pairs_of(
        (prompt, a, b),
        (prompt.upper(), b, a),  # the sides exchanged
        (prompt, a + " and more", b),  # nearly the same
        (prompt, b, "well, " + a),  # both
        (prompt, a, c),  # one side is another text
        (a, prompt, b),  # the same texts in other fields
        ("", "yes", "no"),
        ("", "no", "yes"),
        ("", "yes", "never"),
    )
    same, turned = same_rows(rows, LMSYS, 0.8)
    groups = [same.tolist().index(number) for number in same]
    assert groups == [0, 0, 0, 0, 4, 5, 6, 6, 8]
    assert [turned[row] ^ turned[0] for row in range(4)] == [False, True, False, True]
    assert turned[6] != turned[7]
    exact, _ = same_rows(rows, LMSYS, None)
    assert [exact.tolist().index(number) for number in exact] == [0, 0, 2, 3, 4, 5, 6, 6, 8]


@given(st.lists(st.tuples(*[st.sampled_from(["alpha beta gamma", "alpha beta gamma!", "x", ""])] * 3), max_size=8))
def test_exchanging_a_rows_sides_keeps_its_group_and_turns_it(rows: list[tuple[str, str, str]]) -> None:
    if not rows:
        return
    mirrored = [(prompt, b, a) for prompt, a, b in rows]
    same, turned = same_rows(pairs_of(*rows, *mirrored), LMSYS, 0.8)
    count = len(rows)
    assert same[:count].tolist() == same[count:].tolist()
    for place, (_, a, b) in enumerate(rows):
        assert (turned[place] != turned[place + count]) or normal(a) == normal(b)


def test_rows_of_one_text_have_no_sides() -> None:
    task = Task(name="sentiment", fields=("text",), classes=("bad", "good"))
    frame = canonical(["the same text", "The  same text", "another one"]).rename({"prompt": "text"})
    same, turned = same_rows(frame, task, 0.8)
    assert same[0] == same[1] != same[2]
    assert not turned.any()
