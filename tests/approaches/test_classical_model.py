"""Logistic regression and the file of a classical model: exact swaps, no leak, scikit-learn's own figures."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classical_support import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pairclf.approaches import classical_model
from pairclf.approaches.classical_model import ClassicalModel, characters, check, fit_extracted, load
from pairclf.approaches.classical_vectors import extract
from pairclf.config import Classical
from pairclf.demo.arena import generate
from pairclf.errors import BundleError, ConfigError, DataError
from pairclf.scores.metrics import Floats, log_loss
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import LMSYS, WSDM, Row, Task

TOPICS = Task(name="topics", fields=("text",), classes=("animal", "tool", "fruit"))
LABELS = Task(name="labels", fields=("title", "text"), classes=("rude", "long", "empty"), multi_label=True)
YES_NO = Task(name="yes_no", fields=("text",), classes=("no", "yes"))
SMALL = Classical(n_features=64)
WORDS = {"animal": "cat dog cow lion", "tool": "hammer saw drill knife", "fruit": "apple pear plum mango"}


def arena(n: int, seed: int = 0, dirt: float = 0.0) -> tuple[list[Row], Floats]:
    comparisons = generate(n, seed=seed, dirt=dirt).rows
    rows = [
        Row(row.id, {"prompt": row.prompt, "response_a": row.response_a, "response_b": row.response_b})
        for row in comparisons
    ]
    return rows, np.eye(3)[[row.label for row in comparisons]]


def pair(prompt: str, a: str, b: str) -> Row:
    return Row("r", {"prompt": (prompt,), "response_a": (a,), "response_b": (b,)})


def single(task: Task, *texts: str) -> list[Row]:
    return [Row(f"r{number}", dict.fromkeys(task.fields, (text,))) for number, text in enumerate(texts)]


def fitted(task: Task, rows: Sequence[Row], targets: Floats, config: Classical = SMALL) -> ClassicalModel:
    return fit(rows, targets, np.ones(len(rows)), task, config, seed=0)


def topics(n: int = 60) -> tuple[list[Row], Floats]:
    words = [text.split() for text in WORDS.values()]
    texts = [" ".join(words[i % 3][(i // 3 + j) % 4] for j in range(3)) for i in range(n)]
    return single(TOPICS, *texts), np.eye(3)[[i % 3 for i in range(n)]]


TEXTS = st.text(st.sampled_from("ab cd\n.é中"), max_size=30)
ARENA_ROWS, ARENA_TARGETS = arena(120)
ARENA_MODEL = fitted(LMSYS, ARENA_ROWS, ARENA_TARGETS)
WSDM_MODEL = fitted(WSDM, ARENA_ROWS, ARENA_TARGETS[:, :2] + ARENA_TARGETS[:, 2:] / 2)


# --- swap ------------------------------------------------------------------------------------------------------------


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=60)
def test_a_swap_exchanges_the_logits_to_the_last_bit(prompt: str, a: str, b: str) -> None:
    row = pair(prompt, a, b)
    for model in (ARENA_MODEL, WSDM_MODEL):
        columns = list(model.task.swapped_columns)
        logits = model.logits([row, model.task.swap_row(row)])
        assert np.array_equal(logits[0, 1], logits[1, 0])
        assert np.array_equal(logits[0, 0], logits[0, 1][columns])
        assert np.isfinite(logits).all()


def test_a_swap_exchanges_the_logits_of_real_rows() -> None:
    rows, _ = arena(200, seed=5, dirt=0.3)
    swapped = [LMSYS.swap_row(row) for row in rows]
    assert np.array_equal(ARENA_MODEL.logits(swapped), ARENA_MODEL.logits(rows)[:, ::-1])


@pytest.mark.parametrize("model", [ARENA_MODEL, WSDM_MODEL], ids=["3 classes", "2 classes"])
def test_identical_sides_have_equal_chances(model: ClassicalModel) -> None:
    logits = model.logits([pair("Say dog.", "dog", "dog"), pair("", "", "")])
    assert np.array_equal(logits[..., 0], logits[..., 1])


def test_the_order_of_the_training_rows_sides_does_not_matter() -> None:
    half = len(ARENA_ROWS) // 2
    rows = [LMSYS.swap_row(row) for row in ARENA_ROWS[:half]] + ARENA_ROWS[half:]
    targets = np.concatenate([ARENA_TARGETS[:half][:, [1, 0, 2]], ARENA_TARGETS[half:]])
    model = fitted(LMSYS, rows, targets)
    np.testing.assert_allclose(model.logits(ARENA_ROWS), ARENA_MODEL.logits(ARENA_ROWS), atol=5e-3)


def test_a_task_with_several_classes_that_stay_swaps_too() -> None:
    task = LMSYS.model_copy(update={"classes": ("both_bad", "a", "tie", "b"), "swap_classes": ("a", "b")})
    targets = np.stack([np.roll(ARENA_TARGETS[:, 2], 1), *ARENA_TARGETS.T[[0, 2, 1]]], axis=1)
    model = fitted(task, ARENA_ROWS, targets / targets.sum(axis=1, keepdims=True))
    swapped = model.logits([task.swap_row(row) for row in ARENA_ROWS])
    assert np.array_equal(swapped, model.logits(ARENA_ROWS)[:, ::-1])


# --- what is learnt --------------------------------------------------------------------------------------------------


def test_generated_comparisons_are_judged_better_than_by_the_prior() -> None:
    rows, targets = arena(900, seed=1)
    model = fitted(LMSYS, rows[:600], targets[:600], Classical())
    chances = mean_of_orders(model.logits(rows[600:]), LMSYS)
    prior = np.broadcast_to(targets[:600].mean(axis=0), chances.shape)
    assert log_loss(chances, targets[600:]) < log_loss(prior, targets[600:]) - 0.05


def test_real_comparisons_are_judged_better_than_by_the_prior(shared: Path) -> None:
    from pairclf.data.rows import read_rows, to_rows

    rows = to_rows(read_rows([shared / "data/arena3/train.csv"], LMSYS, labelled=True, max_rows=1200), LMSYS)
    targets = np.array([row.target for row in rows])
    held_out = np.array([hash_of(row.fields["prompt"]) % 4 == 0 for row in rows])
    train, valid = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    model = fitted(LMSYS, [rows[index] for index in train], targets[train], Classical(n_features=2**14))
    chances = mean_of_orders(model.logits([rows[index] for index in valid]), LMSYS)
    prior = np.broadcast_to(targets[train].mean(axis=0), chances.shape)
    assert log_loss(chances, targets[valid]) < log_loss(prior, targets[valid])


def hash_of(turns: Sequence[str | None]) -> int:
    return sum("".join(turn or "" for turn in turns).encode())


def test_the_classes_of_single_texts_are_learnt() -> None:
    rows, targets = topics()
    logits = fitted(TOPICS, rows, targets, Classical(C=10)).logits(
        single(TOPICS, "lion cat dog", "saw hammer saw", "mango pear plum")
    )
    assert logits.shape == (3, 1, 3)
    assert logits[:, 0].argmax(axis=1).tolist() == [0, 1, 2]


def test_several_labels_are_independent_regressions() -> None:
    texts = ["you fool", "", "good day to you all and yours", "fool that you are, go away now"] * 10
    targets = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0]] * 10, dtype=float)
    rows = single(LABELS, *texts)
    model = fitted(LABELS, rows, targets, Classical(C=10))
    chances = mean_of_orders(model.logits(rows[:4]), LABELS)
    assert np.array_equal(chances > 0.5, targets[:4] > 0.5)
    changed = targets.copy()
    changed[:, 0] = 1 - changed[:, 0]
    other = fitted(LABELS, rows, changed, Classical(C=10)).logits(rows)
    assert np.array_equal(other[..., 1:], model.logits(rows)[..., 1:])
    assert not np.allclose(other[..., 0], model.logits(rows)[..., 0])


def reference(task: Task, rows: Sequence[Row], config: Classical) -> Floats:
    """The TF-IDF of single texts, from scikit-learn's own pieces."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline

    vectorizer = HashingVectorizer(
        ngram_range=config.ngram_range,
        token_pattern=r"\w+|[^\w\s]",
        n_features=config.n_features,
        alternate_sign=False,
        norm=None,
    )
    texts = [row.fields[task.fields[0]][0] for row in rows]
    matrix = make_pipeline(vectorizer, TfidfTransformer(sublinear_tf=True)).fit_transform(texts)
    return np.asarray(matrix.toarray())


@pytest.mark.parametrize("classes", [2, 3])
def test_soft_targets_and_weights_are_those_of_logistic_regression(classes: int) -> None:
    task = YES_NO if classes == 2 else TOPICS
    config = Classical(n_features=64, dense=False, C=1.0)
    rows = single(task, *(row.fields["text"][0] or "" for row in topics(30)[0]))
    random = np.random.default_rng(0)
    targets, weights = random.dirichlet(np.ones(classes), len(rows)), random.uniform(0.1, 2, len(rows))
    model = fit(rows, targets, weights, task, config, seed=0)
    features = np.repeat(reference(task, rows, config), classes, axis=0)
    own = LogisticRegression(C=1.0, max_iter=500)
    own.fit(features, np.tile(np.arange(classes), len(rows)), sample_weight=(targets * weights[:, None]).ravel())
    expected = own.predict_proba(features[::classes])
    np.testing.assert_allclose(mean_of_orders(model.logits(rows), task), expected, atol=1e-9)


def test_a_weight_counts_as_often_as_it_says() -> None:
    rows, targets = topics(30)
    weights = np.where(np.arange(30) < 6, 0.0, 1.0)
    without = fitted(TOPICS, rows[6:], targets[6:])
    assert np.array_equal(fit(rows, targets, weights, TOPICS, SMALL, 0).logits(rows), without.logits(rows))


def test_the_idf_is_that_of_the_training_rows_alone() -> None:
    rows, targets = topics(30)
    model = fitted(TOPICS, rows, targets)
    before = model.space.idf.copy()
    model.logits(single(TOPICS, *["a word that no training row has"] * 50))
    assert np.array_equal(model.space.idf, before)
    more, their_targets = [*rows, *single(TOPICS, "saw saw", "zebra")], np.concatenate([targets, targets[:2]])
    assert not np.array_equal(fitted(TOPICS, more, their_targets).space.idf, before)


@pytest.mark.parametrize(
    "change",
    [
        {"dense": False},
        {"char_ngram_range": (2, 3)},
        {"sublinear_tf": False},
        {"analyzer": "char_wb"},
        {"ngram_range": (1, 1)},
        {"C": 3},
    ],
)
def test_every_setting_changes_the_logits(change: dict[str, object]) -> None:
    rows, targets = arena(60, seed=3)
    other = fitted(LMSYS, rows, targets, Classical.model_validate(SMALL.model_dump() | change))
    assert not np.allclose(other.logits(rows), fitted(LMSYS, rows, targets).logits(rows), atol=1e-3)


@pytest.mark.parametrize("models", [{"model": "svm"}, {"model": "stack", "estimators": ("svm", "nb")}])
def test_solvers_that_stopped_too_early_say_so_once(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows, targets = topics(30)
    fitted(TOPICS, rows, targets, Classical.model_validate({"n_features": 64, "max_iter": 1} | models))
    assert "".join(capsys.readouterr()).count("classical.max_iter=1") == 1


# --- bits ------------------------------------------------------------------------------------------------------------


def test_a_rows_logits_depend_on_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = arena(150, seed=2, dirt=0.2)
    together = ARENA_MODEL.logits(rows)
    assert np.array_equal(np.concatenate([ARENA_MODEL.logits([row]) for row in rows]), together)
    assert np.array_equal(ARENA_MODEL.logits(rows[::-1]), together[::-1])
    monkeypatch.setattr(classical_model, "CHUNK", 7)
    assert np.array_equal(ARENA_MODEL.logits(rows), together)
    assert ARENA_MODEL.logits([]).shape == (0, 2, 3)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    fitted(LMSYS, ARENA_ROWS, ARENA_TARGETS).save(tmp_path / "a.safetensors")
    ARENA_MODEL.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_number_of_threads_changes_no_bit() -> None:
    random = np.random.default_rng(0)
    rows = single(YES_NO, *(" ".join(map(str, random.integers(0, 10**6, 1000))) for _ in range(40)))
    models = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            models.append(fitted(YES_NO, rows, np.eye(2)[[0, 1] * 20], Classical(dense=False, C=100)))
    weights = [model.members["logistic"].arrays["class_weight"] for model in models]
    assert np.array_equal(weights[0], weights[1])


# --- rows at the edge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_fold_with_one_class_or_one_row_gives_finite_logits_and_that_class(label: int) -> None:
    for n in (1, 40):
        targets = np.eye(3)[[label] * n]
        for task, rows in ((LMSYS, ARENA_ROWS[:n]), (TOPICS, topics(40)[0][:n])):
            logits = fitted(task, rows, targets).logits(rows)
            assert np.isfinite(logits).all()
            if task is TOPICS:
                assert (logits[:, 0].argmax(axis=1) == label).all()


def test_a_label_that_every_row_or_none_has_gives_finite_logits() -> None:
    rows = single(LABELS, "a", "b", "c", "d")
    targets = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 0]], dtype=float)
    chances = mean_of_orders(fitted(LABELS, rows, targets).logits(rows), LABELS)
    assert (chances[:, 0] > 0.8).all()
    assert (chances[:, 1] < 0.2).all()


def test_texts_without_words_nulls_and_half_characters_work() -> None:
    fields = [
        {"prompt": (), "response_a": (None,), "response_b": ("",)},
        {"prompt": ("\ud83d",), "response_a": ("\x00", None), "response_b": ("...",)},
    ]
    rows = [Row(str(number), texts) for number, texts in enumerate(fields)]
    targets = np.eye(3)[:2]
    assert np.isfinite(fitted(LMSYS, rows, targets).logits(rows)).all()
    assert [characters(row) for row in rows] == [0, 5]


def test_a_huge_text_works() -> None:
    huge = pair("Say dog.", "dog cat " * 100_000, "x" * 1_000_000)
    assert np.isfinite(ARENA_MODEL.logits([huge])).all()


@pytest.mark.parametrize(
    ("targets", "weights", "what"),
    [
        (np.zeros((0, 3)), np.zeros(0), "no rows"),
        (np.eye(3), np.zeros(3), "no rows"),
        (np.eye(3)[:2], np.ones(3), "a column for each class"),
        (np.full((3, 3), np.nan), np.ones(3), "probabilities"),
        (np.full((3, 3), 0.5), np.ones(3), "probabilities"),
        (np.eye(3), np.array([1, -1, 1.0]), "weights must be 0 or more"),
    ],
)
def test_impossible_training_rows_are_refused(targets: Floats, weights: Floats, what: str) -> None:
    rows = extract(ARENA_ROWS[:3], LMSYS, SMALL)[: len(weights)]
    with pytest.raises(DataError, match=what):
        fit_extracted(rows, range(len(weights)), targets, weights, LMSYS, SMALL, seed=0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="the shorter first"):
        Classical(ngram_range=(3, 2))
    with pytest.raises(ConfigError, match=r"smaller classical\.n_features"):
        check(
            Classical(n_features=2**24),
            Task(name="many", fields=("a", "b"), classes=tuple("abcdefghijk"), swap_fields=None),
        )
    for task in (LMSYS, WSDM, TOPICS, LABELS):
        check(Classical(), task)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "classical.safetensors"
    ARENA_MODEL.save(path)
    return path


@pytest.mark.parametrize("task", [LMSYS, WSDM, TOPICS, LABELS, YES_NO], ids=lambda task: task.name)
def test_a_saved_model_gives_the_same_bits(task: Task, tmp_path: Path) -> None:
    rows, count = ARENA_ROWS if task.swappable else single(task, *"abcdef"), len(task.classes)
    targets = np.eye(count)[[index % count for index in range(len(rows))]]
    model = fitted(task, rows, targets)
    model.save(tmp_path / "model.safetensors")
    assert np.array_equal(load(tmp_path / "model.safetensors", task, SMALL).logits(rows), model.logits(rows))


def test_any_changed_byte_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for at in [*range(0, 600, 7), *range(600, len(content), 211), len(content) - 1]:
        saved.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(BundleError, match=str(saved)):
            load(saved, LMSYS, SMALL)


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "unknown", "nan", "no digest"])
def test_other_arrays_are_refused(change: str, saved: Path) -> None:
    arrays = load_file(saved)
    if change == "shape":
        arrays["logistic.class_weight"] = arrays["logistic.class_weight"].T.copy()
    elif change == "dtype":
        arrays["idf"] = arrays["idf"].view(np.int64)
    elif change == "missing":
        del arrays["logistic.class_bias"]
    elif change == "unknown":
        arrays["extra"] = np.zeros(1)
    elif change == "nan":
        arrays["idf"][3] = np.nan
    save_file(arrays, saved)
    words = {
        "nan": "not finite",
        "no digest": "was changed",
        "missing": "class_bias",
        "unknown": "(?s)extra.*train it again",
    }
    with pytest.raises(BundleError, match=words.get(change, "must be F64")) as caught:
        load(saved, LMSYS, SMALL)
    assert caught.value.where == saved


@pytest.mark.parametrize("change", [{"n_features": 65}, {"ngram_range": (1, 3)}, {"sublinear_tf": False}])
def test_other_settings_are_refused(change: dict[str, object], saved: Path) -> None:
    with pytest.raises(BundleError):
        load(saved, LMSYS, Classical.model_validate(SMALL.model_dump() | change))


def test_other_classes_are_refused_and_another_regularization_is_not(saved: Path) -> None:
    with pytest.raises(BundleError):
        load(saved, LMSYS.model_copy(update={"swap_classes": LMSYS.swap_classes and LMSYS.swap_classes[::-1]}), SMALL)
    load(saved, LMSYS, SMALL.model_copy(update={"C": 2.0, "max_iter": 7}))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(saved: Path) -> None:
    size = struct.unpack("<Q", saved.read_bytes()[:8])[0]
    header = json.loads(saved.read_bytes()[8 : 8 + size])
    header["idf"] = {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 8 << 40]}
    new = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(new)) + new + saved.read_bytes()[8 + size :])
    with pytest.raises(BundleError, match="can't be read"):
        load(saved, LMSYS, SMALL)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100, b"\xff" * 5000])
def test_a_file_that_is_no_model_is_refused(content: bytes, saved: Path) -> None:
    saved.write_bytes(content)
    with pytest.raises(BundleError):
        load(saved, LMSYS, SMALL)
    saved.unlink()
    with pytest.raises(BundleError, match="can't be read"):
        load(saved, LMSYS, SMALL)


def test_neither_torch_nor_pickle_takes_part(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from typing import Any
import numpy as np
from pairclf.approaches.classical_model import fit_extracted, load
from pairclf.approaches.classical_vectors import extract
from pairclf.config import Classical
from pairclf.task import LMSYS, Row
rows = [Row(str(i), {{"prompt": ("p",), "response_a": ("a " * i,), "response_b": ("b",)}}) for i in range(9)]
features = extract(rows, LMSYS, Classical())
model = fit_extracted(features, range(9), np.eye(3)[[0, 1, 2] * 3], np.ones(9), LMSYS, Classical(), 0)
path = Path({str(tmp_path / "model.safetensors")!r})
model.save(path)
assert np.array_equal(load(path, LMSYS, Classical()).logits(rows), model.logits(rows))
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    assert done.returncode == 0
