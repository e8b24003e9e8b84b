"""Which row is meant: a row, its mirror and another row differ; and a bundle knows near prompts as the folds do."""

from __future__ import annotations

import random

import numpy as np
import polars as pl
import pytest
from support.tables import canonical

from pairclf.data.duplicates import SAMPLE, _estimate, _lenient, near_overlap, samples, shingles
from pairclf.data.identity import prompt_marks, row_hashes, seen_by
from pairclf.task import LMSYS, Task

SINGLE = Task(name="single", fields=("prompt",), classes=("bad", "good"))


def words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def test_row_hashes_tell_a_row_from_its_mirror_and_others() -> None:
    sides = [("first", "second"), ("second", "first"), ("first", "else")]
    row, mirror, other = (canonical(["p"], a=a, b=b) for a, b in sides)
    normal = canonical([" P\x00"], a="First", b="second")
    hashes = pl.concat([row_hashes(one, LMSYS) for one in (row, mirror, other, normal)])
    assert hashes["prompt"].n_unique() == 1
    assert hashes["row_hash"].n_unique() == 3
    assert hashes["row_hash"][0] == hashes["row_hash"][3]  # in normal form
    run_together = pl.concat([canonical(["p"], a="a", b="b c"), canonical(["p"], a="a b", b="c")])
    assert row_hashes(run_together, LMSYS)["row_hash"].n_unique() == 2
    assert row_hashes(row, LMSYS)["row_hash"].to_list() == [14090495293119426309]  # the same on every machine


def prompts_of_all_lengths() -> tuple[list[str], list[str]]:
    """Prompts, short and long, and others that are some words away from them, from one to most."""
    known = [" ".join(words(count, seed)) for seed, count in enumerate([3, 8, 20, 40, 80, 200, 400] * 6)]
    draw, fresh = random.Random(1), list[str]()
    for number, prompt in enumerate(known):
        parts = prompt.split()
        for place in draw.sample(range(len(parts)), k=max(1, len(parts) * (number % 6) // 24)):
            parts[place] = "other"
        fresh.append(" ".join(parts))
    return known, [*fresh, *(f"{prompt}!" for prompt in known), "far from all of them", ""]


def test_a_bundle_knows_near_prompts_as_the_folds_do() -> None:
    known, asked = prompts_of_all_lengths()
    training, rows = canonical(known), canonical(asked)
    marks, trained_on = prompt_marks(rows, LMSYS), prompt_marks(training, LMSYS)
    exact = near_overlap(rows, training, LMSYS, 0.8)
    (found,) = seen_by(marks, [trained_on], [0.8])
    whole = pl.Series([len(shingles(prompt)) < 0.7 * SAMPLE for prompt in asked])  # and so are those near to it
    assert found.filter(whole).to_list() == exact.filter(whole).to_list()
    assert exact.sum() > 40
    assert found.filter(exact).all()  # a near one is never missed
    far = near_overlap(rows, training, LMSYS, 0.65)
    assert not found.filter(~far).any()  # and one that is far never met
    assert seen_by(marks, [trained_on], [None])[0].sum() == marks["prompt"].is_in(trained_on["prompt"].to_list()).sum()


def test_one_exclamation_mark_does_not_pass_the_guard() -> None:
    prompt = " ".join(words(30, 0))
    (seen,) = seen_by(prompt_marks(canonical([f"{prompt}!"]), LMSYS), [prompt_marks(canonical([prompt]), LMSYS)], [0.8])
    assert seen.to_list() == [True]


def test_each_model_knows_its_own_prompts() -> None:
    one, other = (" ".join(words(30, seed)) for seed in (0, 1))
    marks = prompt_marks(canonical([one, f"{one}!", f"{other}!", "neither of both"]), SINGLE)
    both = [prompt_marks(canonical([text]), SINGLE) for text in (one, other)]
    found = seen_by(marks, [*both, None, both[0]], [0.8, 0.8, 0.8, None])
    assert [one.to_list() for one in found] == [
        [True, True, False, False],
        [False, False, True, False],
        [None] * 4,
        [True, False, False, False],
    ]


def test_a_bundle_without_samples_knows_equal_prompts_alone() -> None:
    """What an older pairclf wrote: that a prompt is not equal does not say that none is near."""
    marks = prompt_marks(canonical(["the same prompt", "another prompt"]), LMSYS)
    older = marks[:1].select("prompt")
    assert [one.to_list() for one in seen_by(marks, [older, older], [0.8, None])] == [[True, None], [True, False]]
    mixed = pl.concat([marks[:1], older], how="diagonal")
    assert seen_by(marks, [mixed], [0.8])[0].to_list() == [True, None]


@pytest.mark.parametrize("changed", [0.05, 0.1, 0.2, 0.4])
def test_samples_estimate_the_index_of_long_prompts(changed: float) -> None:
    draw, errors = np.random.default_rng(0), []
    for seed in range(40):
        texts = words(400, seed)
        one, other = " ".join(texts), " ".join(word if draw.random() > changed else "x" + word for word in texts)
        a, b = set(shingles(one).tolist()), set(shingles(other).tolist())
        first, second = (one.to_numpy() for one in samples(pl.Series([one, other])))
        assert len(first) == SAMPLE
        errors.append(_estimate(first, second) - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.8 - _lenient(0.8)
