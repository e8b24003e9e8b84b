"""Examples of a prompt: which rows they are, how they stand before a row and its mirror, and when they have no room."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from models_support import with_lm_head
from tests_support import make_rows

from pairclf.config import Config, Prompt, override, resolve
from pairclf.config.section import choices
from pairclf.errors import ConfigError
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.examples import CHOICES, pick_examples, with_examples
from pairclf.inputs.render import MARKER, InputBuilder
from pairclf.inputs.sequences import Item, branches_of, index_sequences
from pairclf.inputs.tokenise import settle_template
from pairclf.inspect.show import show
from pairclf.model.backbone import load_tokenizer
from pairclf.model.inputs import open_inputs
from pairclf.model.layouts import shared
from pairclf.model.scoring import items_of
from pairclf.task import AB, BA, LMSYS, Row

WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}


def table(*cells: tuple[str, str, str, int]) -> pl.DataFrame:
    """Rows of (prompt, response_a, response_b, class), with ids from 0."""
    texts = {name: [[row[place]] for row in cells] for place, name in enumerate(LMSYS.fields)}
    targets = [[float(row[3] == number) for number in range(3)] for row in cells]
    return pl.DataFrame({"id": [str(number) for number in range(len(cells))], **texts, "target": targets}).with_columns(
        weight=pl.lit(1.0)
    )


def few(k: int, **prompt: Any) -> Config:
    model = {"readout": "label_tokens", "label_words": WORDS}
    return resolve({"approach": "prompt", "model": model, "prompt": {"k": k, **prompt}})


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


BALANCED = table(
    ("aaaa", "x", "y", 0), ("bb", "x", "y", 0), ("b B ", "x", "y", 1), ("bB", "x", "y", 1), ("ccc", "x", "", 1),
    ("ddd", "long enough", "y", 1), ("e", "x", "y", 2), ("f", "x", "y", 2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("frame", "k", "expected"),
    [
        (BALANCED, 4, ["1", "2", "6", "0"]),
        (BALANCED, 6, ["1", "2", "6", "0", "5", "7"]),
        (BALANCED, 7, ["1", "2", "6", "0", "5", "7", "4"]),
        (BALANCED, 0, []),
        (BALANCED.filter(pl.col("id") != "6").head(6), 3, ["1", "2", "0"]),
        (BALANCED.head(2), 2, ["1", "0"]),
        (BALANCED.head(1), 1, ["0"]),
        (table(("", "", "", 0)), 1, ["0"]),
    ],
    ids=["k=4", "k=6", "an empty text last", "none", "no ties", "one class", "one row", "empty texts"],
)
def test_examples_are_the_shortest_of_each_class_in_turn(frame: pl.DataFrame, k: int, expected: list[str]) -> None:
    """Row 3 has the prompt of row 1, so that no two examples are near duplicates of each other."""
    assert ids(pick_examples(frame, few(k))) == expected
    assert ids(pick_examples(frame.reverse(), few(k))) == expected


@pytest.mark.parametrize(("rows", "k", "there"), [(8, 8, 7), (1, 2, 1), (0, 1, 0)])
def test_fewer_rows_than_examples_are_refused(rows: int, k: int, there: int) -> None:
    with pytest.raises(ConfigError, match=f"prompt.k={k} needs as many training rows .*, and there are {there}"):
        pick_examples(BALANCED.head(rows), few(k))


def test_a_missing_class_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    pick_examples(BALANCED.head(4), few(2))
    assert "no training row has the label winner_tie" in capsys.readouterr().err


# --- before a row ----------------------------------------------------------------------------------------------------


CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>user\n{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def prompt_config(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    base = with_lm_head(base_of("gemma2"), tmp_path_factory.mktemp("base"), tied=True)

    def make(*overrides: str, **sections: Any) -> Config:
        model = {"base": str(base), "quantization": "none", "readout": "label_tokens", "label_words": WORDS}
        tree = {"approach": "prompt", "inputs": {"max_length": 640}, "prompt": {"k": 3}, "model": model}
        return override(resolve(tree | sections), overrides)

    return make


def built(config: Config, examples: list[Row]) -> tuple[InputBuilder, Any]:
    opened = open_inputs(config)
    return with_examples(opened.config, opened.builder, examples), opened


EXAMPLE_ROWS = pick_examples(BALANCED, few(3))


def test_examples_end_in_their_label_and_mirror_with_the_row(prompt_config: Callable[..., Config]) -> None:
    builder, opened = built(prompt_config(), EXAMPLE_ROWS)
    row = Row("9", {"prompt": ("why?",), "response_a": ("one",), "response_b": ("two",)})
    mirror = LMSYS.swap_row(row)
    encoded, of_mirror = builder.encode([row, mirror])
    texts = [opened.tokenizer.decode(order.ids) for order in encoded]
    assert texts[AB] == "<bos>" + "".join(
        f"\n\n### Prompt\n{prompt}\n\n### Response a\n{a}\n\n### Response b\n{b}\n\n### Verdict\n{label}"
        for prompt, a, b, label in (
            ("bb", "x", "y", "A"), ("b B ", "x", "y", "B"), ("e", "x", "y", "t"), ("why?", "one", "two", "")
        )
    )  # fmt: skip
    assert "### Response a\ny\n\n### Response b\nx\n\n### Verdict\nB" in texts[BA], "mirrored, label and all"
    assert [of_mirror[order].ids.tolist() for order in (AB, BA)] == [encoded[order].ids.tolist() for order in (BA, AB)]
    same = builder.encode([Row("8", {**row.fields, "response_b": ("one",)})])[0]
    assert same[AB].ids.tolist() == same[BA].ids.tolist()
    assert "### Verdict\nB\n\n### Prompt" in show(opened._replace(builder=builder), row, coloured=False)[AB].plain


def test_an_example_of_any_length_is_cut_as_a_row_is_and_leaves_the_row_its_room(
    prompt_config: Callable[..., Config],
) -> None:
    long = [Row(str(number), dict.fromkeys(LMSYS.fields, ("w" * 100000,)), (1.0, 0, 0)) for number in range(3)]
    builder, opened = built(prompt_config("inputs.max_length=2000"), long)
    text = opened.tokenizer.decode(builder.encode([make_rows(1)[0]])[0][AB].ids)
    assert text.count("tokens cut") == 3 * 3
    encoded = builder.encode([Row("9", dict.fromkeys(LMSYS.fields, ("v" * 100000,)))])[0]
    assert [len(order.ids) for order in encoded] == [2000, 2000]
    assert sum(name == MARKER for name, *_ in encoded[AB].spans) == 3
    assert len(built(prompt_config(), EXAMPLE_ROWS)[0].encode(make_rows(1))[0][AB].ids) < 400, "short ones leave more"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inputs.max_length=200"], r"too small for prompt.k=3 examples of 33 tokens each .* at least \d+, a row \d+"),
        (["prompt.max_length=30"], r"remedy: set prompt.max_length to at least \d+ and inputs.max_length to at least"),
        (["prompt.max_length=200"], r"too small for prompt.k=3 examples of 200 tokens"),
        (["prompt.k=64"], r"or a smaller prompt.k"),
    ],
)
def test_a_budget_too_small_for_the_examples_is_refused_and_the_remedy_fits(
    prompt_config: Callable[..., Config], overrides: list[str], message: str
) -> None:
    """Before a row is read."""
    with pytest.raises(ConfigError, match=message) as error:
        open_inputs(prompt_config(*overrides))
    numbers = [int(word.strip(",")) for word in str(error.value.remedy).split() if word.strip(",").isdigit()]
    fitting = [f"prompt.max_length={numbers[0]}"] if len(numbers) > 1 else []
    open_inputs(prompt_config(*overrides, *fitting, f"inputs.max_length={numbers[-1]}"))
    with pytest.raises(ConfigError, match=r"too small for prompt\.k"):
        open_inputs(prompt_config(*overrides, *fitting, f"inputs.max_length={numbers[-1] - 2}"))


def test_the_layout_shared_computes_the_examples_once_for_all_rows(prompt_config: Callable[..., Config]) -> None:
    builder, _ = built(prompt_config(), EXAMPLE_ROWS)
    items = items_of(builder.encode(make_rows(8)), orders=2)
    whole = sum(len(item.ids) for item in items)
    before = builder._reserve
    assert before > 100
    assert len(shared(items).inputs["input_ids"][0]) <= whole - 14 * before, "twice, for 8 rows in 2 orders"


def test_the_planner_counts_the_examples_once_a_pass(prompt_config: Callable[..., Config]) -> None:
    builder, _ = built(prompt_config(), EXAMPLE_ROWS)
    encoded = builder.encode(make_rows(30))
    pending = PendingSequences(index_sequences(encoded), (AB, BA))
    before = builder._reserve
    assert len(pending.inputs.prefixes) == 3, "none, the examples, and their mirrors"
    packed_tokens = pending.workload_left(2_000).tokens
    pending.layout = "shared"
    planned = computed = 0.0
    batches = pending.batches(2_000)
    for batch in batches:
        pieces = pending.row_orders(batch)
        items = [Item(row, order, encoded[row][order].ids) for row, orders in pieces for order in orders]
        planned += pending.workload_of(pieces).tokens
        computed += len(shared(items).inputs["input_ids"][0])  # type: ignore[index]
    assert computed <= planned <= computed + len(batches) * before, "examples and mirrors begin alike"
    assert abs(pending.workload_left(2_000).tokens - planned) <= sum(pending.inputs.prefixes), "of a pass"
    assert planned < 0.5 * packed_tokens
    own, _ = built(prompt_config("prompt.examples=random", "inputs.max_length=2000"), POOL)
    assert index_sequences(own.encode(make_rows(30))).prefixes == (0,)


# --- chosen for each row ---------------------------------------------------------------------------------------------

POOL = [
    Row(str(number), {"prompt": (prompt,), "response_a": (f"a{number}",), "response_b": (f"b{number}",)}, target)
    for number, (prompt, target) in enumerate(
        (prompt, target)
        for prompt in ("how do whales sing", "how to boil an egg", "name a prime number", "what is the tallest tree")
        for target in ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))
    )
]


def shown_before(config: Config, row: Row) -> list[int]:
    """The numbers of the examples before a row, told by their answers."""
    builder, opened = built(config, POOL)
    text = opened.tokenizer.decode(builder.encode([row])[0][AB].ids)
    return [int(number) for number in re.findall(r"### Response a\n[ab](\d+)", text)]


def asked(prompt: str, row_id: str = "x", **texts: str) -> Row:
    return Row(row_id, {"prompt": (prompt,), "response_a": ("yes",), "response_b": ("no",)})


@pytest.mark.parametrize("examples", ["random", "nearest"])
def test_no_example_has_the_rows_prompt_or_a_near_one(prompt_config: Callable[..., Config], examples: str) -> None:
    overrides = [f"prompt.examples={examples}", "inputs.max_length=3000", "prompt.k=12"]
    for prompt, near in (("How do  whales SING", None), ("how do whales sing?", 0.8)):
        threshold = f"folds.near_duplicate_threshold={'null' if near is None else near}"
        numbers = shown_before(prompt_config(*overrides, threshold), asked(prompt))
        assert sorted(numbers) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    far = prompt_config(*overrides, "folds.near_duplicate_threshold=null")
    assert len(shown_before(far, asked("how do whales sing?"))) == 12, "without a threshold, equal prompts alone"


def test_random_examples_hang_on_seed_and_id_alone_and_take_the_classes_in_turn(
    prompt_config: Callable[..., Config],
) -> None:
    config = prompt_config("prompt.examples=random", "inputs.max_length=2000")
    drawn = {row_id: shown_before(config, asked("why", row_id)) for row_id in "abcd"}
    assert all([number % 3 for number in numbers] == [0, 1, 2] for numbers in drawn.values())
    assert len({tuple(numbers) for numbers in drawn.values()}) > 1
    assert shown_before(config, asked("another text", "a")) == drawn["a"]
    assert shown_before(config.model_copy(update={"seed": 1}), asked("why", "a")) != drawn["a"]


def test_nearest_examples_have_similar_prompts_the_most_similar_one_last(prompt_config: Callable[..., Config]) -> None:
    config = prompt_config("prompt.examples=nearest", "inputs.max_length=2000")
    assert shown_before(config, asked("which tree is the tallest tree what")) == [11, 10, 9]
    assert shown_before(config, asked("boil me an egg, will you")) == [5, 4, 3]


def test_rows_with_examples_of_their_own_stay_within_the_budget(prompt_config: Callable[..., Config]) -> None:
    builder, _ = built(prompt_config("prompt.examples=random", "inputs.max_length=1000"), POOL)
    rows = [Row(str(number), dict.fromkeys(LMSYS.fields, ("v" * 5_000,)), None) for number in range(6)]
    lengths = [len(order.ids) for encoded in builder.encode(rows) for order in encoded]
    assert 990 < min(lengths) <= max(lengths) == 1000


def test_every_choice_of_examples_is_a_setting() -> None:
    assert CHOICES.keys() == {*choices(Prompt.model_fields["examples"].annotation)}


def test_a_pool_is_the_shortest_rows_of_each_class(prompt_config: Callable[..., Config]) -> None:
    assert ids(pick_examples(BALANCED, few(2, examples="random", pool=4))) == ["1", "2", "6", "0"]
    assert len(pick_examples(BALANCED, few(2, examples="random"))) == 7, "as many as there are"


def test_a_chat_template_has_the_examples_inside_of_the_users_message(prompt_config: Callable[..., Config]) -> None:
    config = prompt_config(inputs={"max_length": 2000, "template": "judge"}, prompt={"k": 1})
    tokenizer = load_tokenizer(config.model.base)
    tokenizer.chat_template = CHAT
    inputs = config.inputs.model_copy(update={"template": settle_template(config.inputs.template, tokenizer)})
    builder = InputBuilder(tokenizer, LMSYS, inputs, example=config.prompt.template)
    text = tokenizer.decode(with_examples(config, builder, EXAMPLE_ROWS[:1]).encode(make_rows(1))[0][BA].ids)
    assert text.startswith("<bos><start_of_turn>user\nTwo assistants answered the same prompt.")
    question = "[End]\nWhich is it: response a, response b or tie?"
    assert f"prefer.\n\n[Prompt]\nbb\n\n[Response a]\nx\n\n[Response b]\ny\n\n{question}\nA\n\n[Prompt]\nques" in text
    assert text.endswith(f"{question}<end_of_turn>\n<start_of_turn>model\n")


def test_interleaved_rows_have_examples_too(prompt_config: Callable[..., Config]) -> None:
    builder, opened = built(
        prompt_config(
            inputs={"max_length": 900, "template": {"turns": "interleaved", "instruction": "Judge."}},
            prompt={"k": 1, "template": "\n\nFor example:{rounds}\nSaid: "},
        ),
        EXAMPLE_ROWS[:1],
    )
    text = opened.tokenizer.decode(builder.encode(make_rows(1))[0][BA].ids)
    example = "For example:\n\n### Prompt\nbb\n\n### Response a\nx\n\n### Response b\ny\nSaid: A"
    assert text.startswith(f"<bos>Judge.\n\n{example}\n\n### Prompt\nquestion 0\n")


# --- several labels at once ------------------------------------------------------------------------------------------

SEVERAL = {"name": "topics", "fields": ["text"], "classes": ["sea", "law"], "multi_label": True}


def labelled(base: str, *overrides: str, **prompt: Any) -> Config:
    model = {"base": base, "quantization": "none", "readout": "label_tokens", "label_words": {"yes": "Y", "no": "N"}}
    template = {"text": "{text}\n\nIs it about {label}?\n", "labels": {"sea": "the sea", "law": "law"}}
    inputs = {"max_length": 640, "template": template}
    tree = {"task": SEVERAL, "approach": "prompt", "inputs": inputs, "model": model, "prompt": {"k": 4, **prompt}}
    return override(resolve(tree), overrides)


def topics(*cells: tuple[str, int, int]) -> pl.DataFrame:
    targets = [[float(sea), float(law)] for _, sea, law in cells]
    texts = [text for text, *_ in cells]
    frame = pl.DataFrame({"id": texts, "text": [[text] for text in texts], "target": targets})
    return frame.with_columns(weight=pl.lit(1.0))


TOPICS = topics(("neither", 0, 0), ("both of them", 1, 1), ("just law", 0, 1), ("the sea", 1, 0), ("both", 1, 1))


def test_each_example_is_about_the_next_label_which_half_of_them_have(prompt_config: Callable[..., Config]) -> None:
    config = labelled(prompt_config().model.base)
    examples = pick_examples(TOPICS, config)
    assert ids(examples) == ["both", "neither", "just law", "both of them"]
    builder, opened = built(config, examples)
    ((encoded,),) = builder.encode([Row("9", {"text": ("a row",)})])
    sea, law = (opened.tokenizer.decode(branch) for branch in branches_of(encoded.ids))
    shown = "".join(
        f"\n\n{text}\n\nIs it about {label}?\n{answer}"
        for text, label, answer in (
            ("both", "the sea", "Y"), ("neither", "law", "N"), ("just law", "the sea", "N"),
            ("both of them", "law", "Y"),
        )
    )  # fmt: skip
    assert sea == f"<bos>{shown}\n\na row\n\nIs it about the sea?\n"
    assert law == f"<bos>{shown}\n\na row\n\nIs it about law?\n"
    assert index_sequences([(encoded,), (encoded,)]).prefixes == (0, encoded.spans[3].start), "shared by all rows"


@pytest.mark.parametrize("examples", ["random", "nearest"])
def test_chosen_examples_about_labels_keep_their_answers(prompt_config: Callable[..., Config], examples: str) -> None:
    config = labelled(prompt_config().model.base, k=2, examples=examples)
    pool = pick_examples(TOPICS, config)
    assert len(pool) == 5
    builder, opened = built(config, pool)
    ((encoded,),) = builder.encode([Row("9", {"text": ("a law row",)})])
    text = opened.tokenizer.decode(branches_of(encoded.ids)[0])
    shown = re.findall(r"\n\n(.+?)\n\nIs it about (.+?)\?\n([YN])", text)
    classes = {"the sea": 0, "law": 1}
    assert len(shown) == 2
    for example, label, answer in shown:
        number = ids(pool).index(example)
        assert number % 2 == classes[label]
        assert answer == ("Y" if (pool[number].target or ())[classes[label]] else "N")


def test_a_label_that_no_row_has_is_noted(
    prompt_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = labelled(prompt_config().model.base, k=2)
    assert ids(pick_examples(topics(("a", 0, 0), ("b", 1, 0)), config)) == ["b", "a"]
    assert "no training row has the label law" in capsys.readouterr().err
