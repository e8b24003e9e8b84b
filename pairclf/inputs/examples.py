"""Examples for a few-shot prompt: which training rows are shown, and the recipe that shows them before each row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.duplicates import normalised_texts, shingles
from pairclf.data.folds import prompt_hashes
from pairclf.data.rows import targets_of, to_rows
from pairclf.errors import ConfigError
from pairclf.inputs.render import Choose, InputBuilder, TokenisedRow
from pairclf.inputs.truncate import Ids
from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task


def pick_examples(training: pl.DataFrame, config: Config) -> list[Row]:
    """The shortest training rows, of each class in turn, no two of them with the same prompt: k, or `prompt.pool`.

    Rows with a text in every field and with a certain label come first. The rows of a class may run out: then the other
    classes have more. Of a pool there are fewer where there are no more rows.

    Raises:
        ConfigError: there are fewer than k.
    """
    task, k = config.task, config.num_examples
    if not k:
        return []
    targets = targets_of(training).reshape(-1, len(task.classes))
    doubt = -np.abs(targets - 0.5).min(axis=1) if config.by_label else -targets.max(axis=1)
    sizes = [training[name].list.join("").str.len_chars().fill_null(0).to_numpy() for name in task.fields]
    ranked = (
        pl.DataFrame({"id": training["id"], "class": targets.argmax(axis=1), "doubt": doubt})
        .with_columns(prompt_hashes(training, task), pl.Series("size", np.sum(sizes, axis=0)))
        .with_columns(pl.Series("blank", np.min(sizes, axis=0) == 0))
        .with_row_index("place")
        .sort("blank", "doubt", "size", "id")
        .unique("prompt", keep="first", maintain_order=True)
    )
    if len(ranked) < k:
        raise ConfigError(
            f"prompt.k={k} needs as many training rows with different prompts, and there are {len(ranked)}",
            remedy="set a smaller prompt.k (0: no examples), or give more rows in data.train",
        )
    places, count = ranked["place"].to_list(), k if config.prompt.examples == "fixed" else max(k, config.prompt.pool)
    class_of = dict(ranked.select("place", "class").iter_rows())
    in_turn = _label_by_label(places, targets, count) if config.by_label else _in_turn(places, class_of)[:count]
    present = np.flatnonzero((targets[places] >= 0.5).any(axis=0)).tolist() if config.by_label else ranked["class"]
    if missing := [name for number, name in enumerate(task.classes) if number not in present]:
        console.print(f"note: no training row has the label {', '.join(missing)}: no example shows it", style="yellow")
    return to_rows(training[in_turn], task)


def _label_by_label(places: Sequence[int], targets: Floats, count: int) -> list[int]:
    """At most so many places for examples about the next label each, which have it and have it not in turn.

    Where no row is left that does, the first of all stands for it.

    >>> _label_by_label([0, 1, 2, 3], np.array([[0, 0], [1, 1], [0, 1], [1, 0]]), 4)
    [1, 0, 2, 3]
    """
    left, chosen, classes = dict.fromkeys(places), list[int](), targets.shape[1]
    for number in range(min(count, len(places))):
        wanted = (number + number // classes) % 2 == 0
        fitting = (place for place in left if (targets[place, number % classes] >= 0.5) == wanted)
        chosen.append(next(fitting, next(iter(left))))
        del left[chosen[-1]]
    return chosen


def _in_turn(places: Sequence[int], class_of: Mapping[int, int]) -> list[int]:
    """Places of each class in turn, within a class in their order.

    >>> _in_turn([5, 6, 7, 8], {5: 0, 6: 0, 7: 1, 8: 0})
    [5, 7, 6, 8]
    """
    queues = [[place for place in places if class_of[place] == number] for number in sorted(set(class_of.values()))]
    return [place for place in chain.from_iterable(zip_longest(*queues)) if place is not None]


def require_room(config: Config, builder: InputBuilder) -> None:
    """Do nothing if k examples and a row have room, however long they are.

    Raises:
        ConfigError: they have not.
    """
    k = config.num_examples
    if not k:
        return
    each, least = example_length(config), builder.smallest_example + max(map(len, _label_ids(config, builder).values()))
    if each >= least and builder.max_length - k * each >= builder.smallest:
        return
    own = config.prompt.max_length is not None
    fitting = f"prompt.max_length to at least {least} and " if own and each < least else ""
    needed = k * max(each, least) + builder.smallest if own else 2 * max(k * least, builder.smallest)
    raise ConfigError(
        f"inputs.max_length={builder.max_length} is too small for prompt.k={k} examples of {each} tokens each "
        f"(prompt.max_length) and a row: an example takes at least {least}, a row {builder.smallest}",
        remedy=f"set {fitting}inputs.max_length to at least {needed}, or a smaller prompt.k",
    )


def example_length(config: Config) -> int:
    """The budget of an example, in tokens."""
    return config.prompt.max_length or config.inputs.max_length // (2 * config.num_examples)


def with_examples(config: Config, builder: InputBuilder, examples: Sequence[Row]) -> InputBuilder:
    """The recipe that shows k of these examples before every row, as `prompt.examples` says; none: as it is."""
    if not examples:
        return builder
    labels, task = _label_ids(config, builder), config.task
    answers = [
        [labels[_answer(config, number, target)] for target in (row.target, task.swap_target(row.target))]
        for number, row in enumerate(examples)
        if row.target is not None
    ]
    choose = CHOICES[config.prompt.examples](config, builder, examples)
    return builder.preceded_by(examples, answers, choose, k=config.num_examples, max_length=example_length(config))


def _answer(config: Config, number: int, target: Sequence[float]) -> str:
    """What follows an example with this number: its class; or whether it has the label that it is about."""
    if config.by_label:
        return config.answers[int(target[number % len(target)] < 0.5)]
    return config.task.classes[int(np.argmax(target))]


def _label_ids(config: Config, builder: InputBuilder) -> Mapping[str, Ids]:
    """By class, or by yes and no, the tokens of its first word."""
    words = {name: words[0] for name, words in config.model.scored_words.items()}
    return dict(zip(words, builder.tokenizer(list(words.values()), special=True), strict=True))


# --- which of them stand before a row --------------------------------------------------------------------------------


def _fixed(config: Config, builder: InputBuilder, examples: Sequence[Row]) -> Choose:
    return lambda row_id, row: range(len(examples))


def _random(config: Config, builder: InputBuilder, examples: Sequence[Row]) -> Choose:
    """Drawn by seed and id, of each class in turn, or of yes and no."""
    answers = [_answer(config, number, row.target or ()) for number, row in enumerate(examples)]
    classes = {number: config.answers.index(answer) for number, answer in enumerate(answers)}
    first_apart = _first_apart(config, builder, examples)

    def choose(row_id: str, row: TokenisedRow) -> list[int]:
        digest = hashlib.sha256(f"{config.seed} {row_id}".encode()).digest()
        drawn = np.random.default_rng(list(digest)).permutation(len(examples)).tolist()
        return first_apart(_in_turn(drawn, classes), row)

    return choose


def _nearest(config: Config, builder: InputBuilder, examples: Sequence[Row]) -> Choose:
    """Those whose prompts have the most similar tokens by TF-IDF; the most similar one stands last."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfTransformer

    fields, first_apart = _prompt_fields(config.task), _first_apart(config, builder, examples)
    rows = [_tokens_of(row, fields) for row in builder.tokenise(examples)]
    width = 1 + max((int(tokens.max()) for tokens in rows if len(tokens)), default=0)

    def counts(rows: Sequence[Ids]) -> Any:
        known = [tokens[tokens < width] for tokens in rows]
        ids, ends = np.concatenate(known), np.cumsum([0, *map(len, known)])
        return csr_array((np.ones(len(ids)), ids, ends), shape=(len(rows), width))

    transformer = TfidfTransformer(sublinear_tf=True)
    pool = transformer.fit_transform(counts(rows))

    def choose(row_id: str, row: TokenisedRow) -> list[int]:
        similarity = (pool @ transformer.transform(counts([_tokens_of(row, fields)])).T).toarray()[:, 0]
        return first_apart(np.argsort(-similarity, kind="stable").tolist(), row)[::-1]

    return choose


CHOICES: dict[str, Callable[[Config, InputBuilder, Sequence[Row]], Choose]] = {
    "fixed": _fixed,
    "random": _random,
    "nearest": _nearest,
}
"""By `prompt.examples`."""


def _first_apart(
    config: Config, builder: InputBuilder, examples: Sequence[Row]
) -> Callable[[Sequence[int], TokenisedRow], list[int]]:
    """Takes the first k of some examples whose prompts are neither a row's nor near to it.

    Prompts are compared as their tokens read, by `folds.near_duplicate_threshold`.
    """
    fields, near = _prompt_fields(config.task), config.folds.near_duplicate_threshold

    def prompt_of(row: TokenisedRow) -> str:
        return str(normalised_texts(pl.Series([builder.tokenizer.text(_tokens_of(row, fields))])).item())

    prompts = [prompt_of(row) for row in builder.tokenise(examples)]
    known = [shingles(prompt) for prompt in prompts]

    def first_apart(numbers: Sequence[int], row: TokenisedRow) -> list[int]:
        prompt = prompt_of(row)
        own = shingles(prompt)

        def is_near(number: int) -> bool:
            both = len(np.intersect1d(own, known[number], assume_unique=True))
            return near is not None and both >= near * (len(own) + len(known[number]) - both) > 0

        apart = (number for number in numbers if prompt != prompts[number] and not is_near(number))
        return list(islice(apart, config.num_examples))

    return first_apart


def _prompt_fields(task: Task) -> Sequence[str]:
    """The fields that a swap leaves in place; all of them where it leaves none."""
    return [name for name in task.fields if name not in (task.swap_fields or ())] or task.fields


def _tokens_of(row: TokenisedRow, fields: Sequence[str]) -> Ids:
    return np.concatenate([np.zeros(0, dtype=np.int32), *(turn for name in fields for turn in row[name])])
