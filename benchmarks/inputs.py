"""From text to token ids of both orders: pairclf against the ways it is done elsewhere, on the same rows.

    python benchmarks/inputs.py --tokenizer FOLDER [--rows 400] [--repetitions 7] [--threads 1]

Arms, all in one process, each of which makes two sequences of at most 2,048 ids a row:

row loop    a pandas loop over the rows; the tokenizer is called on each row's text in each order, and cuts it
batched     one call of the tokenizer on all rows' texts in both orders, and cuts them
map         `datasets.Dataset.map(batched=True)` around the same call
pairclf     `InputBuilder.encode`: every turn once, head and tail kept, both orders spliced by ids; with fastokens, if
            it is installed and has the same ids
tokenizers  the same without fastokens

Rows follow the length model of LMSYS data: tokens of the prompt ~ LogNormal(median 22, s 1.56), of the responses ~
LogNormal(median 225, s 0.80, correlation 0.65), and a template of about 40 tokens. Process CPU time, and wall
time (`wall_...`), which means something on idle cores alone. Every repetition has rows of its own, and each arm runs
once on them, in an order that changes; the figures are medians over repetitions of ratios within a repetition, and `aa`
is that of pairclf to itself, whose second turn finds the words of the first in its caches. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoTokenizer

from pairclf.config import resolve
from pairclf.inputs.render import InputBuilder
from pairclf.task import LMSYS, Row

MAX_LENGTH = 2048
TEMPLATE = "### Prompt\n{prompt}\n\n### Response A\n{a}\n\n### Response B\n{b}\n\n### Verdict\n"


def make_rows(count: int, tokenizer: Any, seed: int) -> list[dict[str, str]]:
    """Rows of the length model, cut out of one long text at places drawn by lot."""
    random = np.random.default_rng(seed)
    ids = tokenizer(corpus_text(), add_special_tokens=False)["input_ids"]

    def text(tokens: float) -> str:
        length = min(max(1, round(tokens)), 9000)
        start = int(random.integers(0, len(ids) - length))
        return str(tokenizer.decode(ids[start : start + length]))

    rows = []
    for number in range(count):
        prompt = random.lognormal(np.log(22), 1.56)
        z = random.multivariate_normal([0, 0], [[1, 0.65], [0.65, 1]])
        a, b = 225 * np.exp(0.8 * z)
        rows.append({"id": str(number), "prompt": text(prompt), "a": text(a), "b": text(b)})
    return rows


def corpus_text() -> str:
    """Some 200,000 tokens of this project's own pages and sources: prose and code, as in chats."""
    root = Path(__file__).parents[1]
    files = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "pairclf").rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def row_loop(tokenizer: Any, frame: pd.DataFrame) -> list[list[int]]:
    ids = []
    for _, row in frame.iterrows():
        for a, b in ((row["a"], row["b"]), (row["b"], row["a"])):
            text = TEMPLATE.format(prompt=row["prompt"], a=a, b=b)
            ids.append(tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"])
    return ids


def batched(tokenizer: Any, frame: pd.DataFrame) -> list[list[int]]:
    texts = [
        TEMPLATE.format(prompt=prompt, a=one, b=other)
        for prompt, a, b in zip(frame["prompt"], frame["a"], frame["b"], strict=True)
        for one, other in ((a, b), (b, a))
    ]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return ids


def mapped(tokenizer: Any, frame: pd.DataFrame) -> Dataset:
    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["prompt"], batch["a"], batch["b"], strict=True)
        texts = [(TEMPLATE.format(prompt=p, a=a, b=b), TEMPLATE.format(prompt=p, a=b, b=a)) for p, a, b in pairs]
        both = [
            tokenizer(list(side), truncation=True, max_length=MAX_LENGTH)["input_ids"]
            for side in zip(*texts, strict=True)
        ]
        return {"ab": both[0], "ba": both[1]}

    return Dataset.from_pandas(frame).map(encode, batched=True)


def pairclf(builder: InputBuilder, rows: Sequence[Row]) -> Any:
    return builder.encode(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the tokenizers")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = str(options.threads > 1).lower()
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    disable_caching()
    disable_progress_bars()

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    raw = make_rows(options.rows * (options.repetitions + 1), tokenizer, seed=0)
    names = zip(LMSYS.fields, ("prompt", "a", "b"), strict=True)
    fields = list(names)
    builder, plain = (
        InputBuilder(tokenizer, LMSYS, resolve({"inputs": {"max_length": MAX_LENGTH}}).inputs) for _ in range(2)
    )
    plain.tokenizer._is_tried = True  # as if fastokens were not installed
    arms: dict[str, Callable[[pd.DataFrame, list[Row]], Any]] = {
        "row_loop": lambda frame, rows: row_loop(tokenizer, frame),
        "batched": lambda frame, rows: batched(tokenizer, frame),
        "map": lambda frame, rows: mapped(tokenizer, frame),
        "tokenizers": lambda frame, rows: pairclf(plain, rows),
        "pairclf": lambda frame, rows: pairclf(builder, rows),
        "pairclf_again": lambda frame, rows: pairclf(builder, rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    walls: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(options.repetitions + 1):
        part = raw[repetition * options.rows : (repetition + 1) * options.rows]
        frame = pd.DataFrame(part)
        rows = [Row(one["id"], {field: (one[name],) for field, name in fields}) for one in part]
        order = list(arms)[:-1]
        for name in [*order[repetition % len(order) :], *order[: repetition % len(order)], "pairclf_again"]:
            start, began = time.process_time(), time.perf_counter()
            arms[name](frame, rows)
            if repetition:  # the first warms up
                seconds[name].append(time.process_time() - start)
                walls[name].append(time.perf_counter() - began)
    lengths = [len(one.ids) for row in builder.encode(rows) for one in row]
    print(f"{options.rows} rows, tokens a sequence: median {median(lengths):.0f}, longest {max(lengths)}")
    for name, taken in seconds.items():
        print(f"{name:14s} {options.rows / median(taken):8.0f} rows per CPU-second")

    def ratio(slow: str, fast: str, of: dict[str, list[float]] = seconds) -> float:
        return round(median(one / other for one, other in zip(of[slow], of[fast], strict=True)), 3)

    print(
        json.dumps(
            {
                "over_row_loop": ratio("row_loop", "pairclf"),
                "over_batched": ratio("batched", "pairclf"),
                "over_map": ratio("map", "pairclf"),
                "over_row_loop_without_fastokens": ratio("row_loop", "tokenizers"),
                "over_batched_without_fastokens": ratio("batched", "tokenizers"),
                "wall_over_row_loop": ratio("row_loop", "pairclf", walls),
                "wall_over_batched": ratio("batched", "pairclf", walls),
                "aa": ratio("pairclf_again", "pairclf"),
            }
        )
    )


if __name__ == "__main__":
    main()
