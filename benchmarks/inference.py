"""Scoring rows in both orders with a ~30M-parameter model: pairclf against the ways it is done elsewhere.

    python benchmarks/inference.py [--model llama|gemma2] [--workload lmsys] [--rounds 1] [--quick]

Arms, each in a process of its own that lives to the end, one thread, float32, the same weights and ids:

file_order      transformers' ForSequenceClassification, 8 rows a batch as they stand in the file, padded; AB, then BA
sorted          the same, in batches of 8 of the whole file sorted by length
single          the same, one row at a time without padding
cross_encoder   sentence-transformers' CrossEncoder.predict of the texts, 8 a batch; it sorts them by length itself
from_texts      pairclf, from the same texts on: the other side of `cross_encoder`
padded          pairclf, `predict.layout=padded`
untrimmed       pairclf, `packed`, and the last layer computed for all tokens
packed          pairclf, `packed`, the last layer where it is read
each            pairclf, `packed`, and equal sequences scored each for itself (`shared` finds most of them anyhow)
pairclf         pairclf as it comes: `shared`, the last layer where it is read, equal sequences once
pairclf_again   the same once more: how much two figures differ by chance

Transformers takes its own choice of attention: sdpa for Llama, eager for Gemma-2, whose scores are capped. A round is
40 rows of a file of 25,000: five batches of 8 neighbours in its order of length, evenly spread over it, so that a full
sort is seen at its best; `file_order` takes a row or two of each at a time, which makes half of its tokens padding (52%
over the whole file). In each of five repetitions an arm takes its next 8 rows, arms in an order that changes. In the
end all have scored the same rows, and no logit may differ by more than 1e-4. A ratio is of the seconds of a round, and
the median over rounds; `spread` is its range over the repetitions.

Workloads: `lmsys`, rows of the length model of LMSYS data: tokens of the prompt ~ LogNormal(median 22, s 1.56), of the
responses ~ LogNormal(median 225, s 0.80, correlation 0.65), a template, and no more than 2,048 in all; `uniform`, all
of one length, where packing is no use; `instruction`, `lmsys` with 150 tokens before each row; `duplicates`, 100 rows
of the file's shortest quarter, 5 of which repeat others and 1 of which has A == B; `memory`, the peak of a process
after 4 rows and after 16, and with a budget of 8 times as many tokens; beside it what `model/prediction_memory.py`
foretold before the first batch.

Process CPU time. The last line is one JSON object. benchmarks/gpu.py is about GPUs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pairclf.config import Config, resolve
from pairclf.inputs.render import Encoded, InputBuilder
from pairclf.task import LMSYS, Row

FILE, BATCH, CLASSES, LONGEST, INSTRUCTION, TOLERANCE = 25_000, 8, 3, 2048, 150, 1e-4
EMBEDDED = Path(__file__).parents[1] / "pairclf" / "embedded" / "llama-tiny"

HEADS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "gemma2": {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 1024},
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64},
    "gemma2": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "head_dim": 128},
}
VOCABULARY = {"llama": 32_000, "gemma2": 64_000}
QUICK: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

Logits = NDArray[np.float64]


# --- rows ------------------------------------------------------------------------------------------------------------


class Workload(NamedTuple):
    """Rows to be scored.

    Attributes:
        rows: their texts, short enough to be cut by nobody.
        shares: what an arm takes in each repetition.
        shuffled: the same for `file_order`.
        arms: who takes part.
    """

    rows: list[Row]
    shares: list[list[int]]
    shuffled: list[list[int]]
    arms: list[str]


def lmsys_lengths(random: np.random.Generator, scale: float, longest: int) -> NDArray[np.int64]:
    """`(FILE, 3)` tokens of prompt and responses, sorted by their sum; a row over the limit is cut in proportion."""
    prompts = random.lognormal(np.log(22), 1.56, FILE)
    sides = 225 * np.exp(0.8 * random.multivariate_normal([0, 0], [[1, 0.65], [0.65, 1]], FILE))
    lengths = scale * np.column_stack([prompts, sides])
    lengths *= np.minimum(1, longest / lengths.sum(axis=1))[:, None]
    tokens = np.maximum(1, lengths.astype(np.int64))
    by_length: NDArray[np.int64] = tokens[np.argsort(tokens.sum(axis=1), kind="stable")]
    return by_length


def make_rows(lengths: NDArray[np.int64], words: Sequence[str], random: np.random.Generator) -> list[Row]:
    """Rows of words that are one token each, wherever they stand."""
    rows = []
    for number, sizes in enumerate(lengths.tolist()):
        texts = ["".join(random.choice(words, size)) for size in sizes]
        rows.append(Row(str(number), {name: (text,) for name, text in zip(LMSYS.fields, texts, strict=True)}))
    return rows


def make_workload(name: str, quick: bool, round_: int, rounds: int) -> Workload:
    """The rows of one round, the same in every process."""
    random = np.random.default_rng((round_, 7))
    scale, longest = (1 / 32, 96) if quick else (1.0, LONGEST)
    file = lmsys_lengths(random, scale, longest - 48)
    words = words_of(open_tokenizer(EMBEDDED))
    if name == "uniform":
        typical = np.tile(file[FILE // 2], (BATCH, 1))
        return Workload(make_rows(typical, words, random), [[*range(BATCH)]], [], IN["uniform"])
    if name == "duplicates":
        count = 20 if quick else 100
        rows = make_rows(file[np.sort(random.choice(FILE // 4, count, replace=False))], words, random)
        prompt, a, _ = (rows[0].fields[field] for field in LMSYS.fields)
        rows[0] = replace(rows[0], fields=dict(zip(LMSYS.fields, (prompt, a, a), strict=True)))
        for number in range(count // 20):
            rows[-1 - number] = replace(rows[5 + 10 * number], id=str(count - 1 - number))
        return Workload(rows, [[*range(count)]], [], IN["duplicates"])
    shares = 2 if name == "instruction" else 5
    offset = float(random.uniform(0.45, 0.65)) if rounds > 1 else 0.55
    starts = [int((share + offset) * FILE / shares) - BATCH // 2 for share in range(shares)][::-1]  # longest first
    rows = make_rows(np.concatenate([file[start : start + BATCH] for start in starts]), words, random)
    clusters = np.arange(BATCH * shares).reshape(shares, BATCH)
    return Workload(rows, clusters.tolist(), clusters.T.reshape(shares, BATCH).tolist(), IN[name])


def open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def words_of(tokenizer: Any) -> list[str]:
    """Blank and letters, one token each: they stay so whatever stands beside them."""
    texts = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    found = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    return [text for text in found if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1]


def config_of(workload: str, base: Path) -> Config:
    length = INSTRUCTION if workload == "instruction" else 0
    template = {"instruction": "".join(words_of(open_tokenizer(EMBEDDED))[:length])} if length else {}
    return resolve(
        {
            "model": {"base": str(base), "quantization": "none", "lora": None},
            "inputs": {"max_length": LONGEST + INSTRUCTION, "template": template},
        }
    )


# --- arms ------------------------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A round of a workload: its rows, how they become ids, the ids, and the pairs of texts that give the same ids."""

    workload: Workload
    builder: InputBuilder
    encoded: list[tuple[Encoded, ...]]
    pairs: list[list[tuple[str, str]]]


@cache
def open_bench(name: str, round_: int, quick: bool, rounds: int) -> Bench:
    config, workload = config_of(name, EMBEDDED), make_workload(name, quick, round_, rounds)
    builder = InputBuilder(open_tokenizer(EMBEDDED), config.task, config.inputs)
    encoded = builder.encode(workload.rows)
    assert not any(sum(one.dropped.values()) for row in encoded for one in row), "a row was cut"
    return Bench(workload, builder, encoded, [texts_of(row, config) for row in workload.rows])


Arm = Callable[[Bench, Sequence[int]], Logits]
"""Takes rows of a workload, and returns their logits `(rows, 2, C)`, each order's in its own columns."""


def peer_arm(rows_per_batch: int, *, by_length: bool) -> Callable[[Path, int], Arm]:
    def make(folder: Path, budget: int) -> Arm:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

        @torch.inference_mode()
        def run(bench: Bench, share: Sequence[int]) -> Logits:
            logits = np.empty((len(share), 2, CLASSES))
            for order in (0, 1):
                sequences = [torch.from_numpy(bench.encoded[row][order].ids).long() for row in share]
                places = np.arange(len(share))
                if by_length:
                    places = np.argsort([-len(one) for one in sequences], kind="stable")
                for start in range(0, len(share), rows_per_batch):
                    batch = places[start : start + rows_per_batch]
                    logits[batch, order] = model(**pad([sequences[place] for place in batch])).logits.numpy()
            return logits

        return run

    return make


def pad(sequences: Sequence[Tensor]) -> dict[str, Any]:
    """Padded on the right, with a mask where anything is padded, as a tokenizer's `pad` gives it."""
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(one) for one in sequences])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "use_cache": False,
    }


def cross_encoder_arm(folder: Path, budget: int) -> Arm:
    """Pairs of texts in, scores out: it tokenises, sorts by length and pads by itself."""
    from sentence_transformers import CrossEncoder  # type: ignore[import-not-found, unused-ignore]

    model = CrossEncoder(str(folder), device="cpu", max_length=2 * LONGEST, local_files_only=True)
    compared: set[int] = set()

    def run(bench: Bench, share: Sequence[int]) -> Logits:
        if id(bench) not in compared:  # with the rows that warm up
            compared.add(id(bench))
            for ours, pair in zip(bench.encoded[share[0]], bench.pairs[share[0]], strict=True):
                theirs = model.preprocess([pair])["input_ids"][0].numpy()
                assert np.array_equal(theirs, ours.ids), "CrossEncoder's ids are not those of the other arms"
        given = [pair for row in share for pair in bench.pairs[row]]
        scores = model.predict(given, batch_size=BATCH, show_progress_bar=False)
        return np.asarray(scores, dtype=np.float64).reshape(len(share), 2, CLASSES)

    return run


def texts_of(row: Row, config: Config) -> list[tuple[str, str]]:
    """A row in both orders as pairs of texts: up to response A, and from there on."""
    template = config.inputs.template
    left, right = ((template.instruction or "") + template.text).split("{response_a}")
    prompt, a, b = (row.fields[field][0] or "" for field in LMSYS.fields)
    return [
        (left.replace("{prompt}", prompt), one + right.replace("{response_b}", other))
        for one, other in ((a, b), (b, a))
    ]


def pairclf_arm(
    layout: str, *, trim: bool = True, once: bool = True, from_texts: bool = False
) -> Callable[[Path, int], Arm]:
    def make(folder: Path, budget: int) -> Arm:
        scorer = make_scorer(folder, layout)
        scorer.trim = scorer.trim and trim

        def run(bench: Bench, share: Sequence[int]) -> Logits:
            if from_texts:
                encoded = bench.builder.encode([bench.workload.rows[row] for row in share])
            else:
                encoded = [bench.encoded[row] for row in share]
            return score_all(scorer, encoded, budget, once=once)

        return run

    return make


def make_scorer(folder: Path, layout: str) -> Any:
    """pairclf's model with the head that the others have."""
    from safetensors import safe_open

    from pairclf.model.engine import build
    from pairclf.model.scoring import ClassifierScorer

    classifier = build(config_of("lmsys", folder), torch.device("cpu")).eval()
    with safe_open(folder / "model.safetensors", "pt") as weights, torch.no_grad():
        head: Any = classifier.head
        head.weight.copy_(weights.get_tensor("score.weight"))
        head.bias.zero_()
    return ClassifierScorer(classifier, layout)


def score_all(scorer: Any, encoded: Sequence[tuple[Encoded, ...]], budget: int, *, once: bool) -> Logits:
    """As `predict` plans it: rows in both orders, longest first, equal sequences once."""
    from pairclf.inference.pending import PendingSequences
    from pairclf.inputs.sequences import Item, index_sequences

    inputs = index_sequences(encoded)
    if not once:
        inputs = replace(inputs, duplicate_of=np.arange(inputs.duplicate_of.size).reshape(inputs.duplicate_of.shape))
    backlog = PendingSequences(inputs, (0, 1))
    backlog.layout = scorer.layout
    logits = np.full((inputs.duplicate_of.size, CLASSES), np.nan)
    for members in backlog.batches(budget):
        sequences = [(piece.row, order) for piece in backlog.row_orders(members) for order in piece.orders]
        found, _ = scorer([Item(row, order, encoded[row][order].ids) for row, order in sequences])
        logits[[row * 2 + order for row, order in sequences]] = found
    scored: Logits = logits[inputs.duplicate_of]
    return scored


ARMS: dict[str, Callable[[Path, int], Arm]] = {
    "file_order": peer_arm(BATCH, by_length=False),
    "sorted": peer_arm(BATCH, by_length=True),
    "single": peer_arm(1, by_length=False),
    "cross_encoder": cross_encoder_arm,
    "from_texts": pairclf_arm("shared", from_texts=True),
    "padded": pairclf_arm("padded"),
    "untrimmed": pairclf_arm("packed", trim=False),
    "packed": pairclf_arm("packed"),
    "each": pairclf_arm("packed", once=False),
    "pairclf": pairclf_arm("shared"),
    "pairclf_again": pairclf_arm("shared"),
}
IN = {
    "lmsys": [name for name in ARMS if name != "each"],
    "uniform": ["sorted", "padded", "untrimmed", "packed", "pairclf"],
    "instruction": ["sorted", "packed", "pairclf"],
    "duplicates": ["each", "packed", "pairclf"],
}


# --- processes -------------------------------------------------------------------------------------------------------


def work(name: str, folder: Path, options: argparse.Namespace, pipe: Connection) -> None:
    """An arm's process: takes (workload, round, rows) until it gets None; answers CPU seconds and logits."""
    torch.set_num_threads(1)
    quiet()
    arm = ARMS[name](folder, options.tokens_per_batch)
    while (asked := pipe.recv()) is not None:
        workload, round_, share = asked
        bench = open_bench(workload, round_, options.quick, options.rounds)
        start = time.process_time()
        logits = arm(bench, share)
        pipe.send((time.process_time() - start, logits))


@contextmanager
def working(names: Sequence[str], folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """A process an arm; they are forks of one that has imported what all need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pairclf.model.scoring", "pairclf.inference.pending", "sentence_transformers"])
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(name, folder, options, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that `recv` fails if the process dies
    yield pipes
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def make_base(folder: Path, options: argparse.Namespace) -> int:
    """A randomly filled model with a head, and a tokenizer that puts a bos first, saved; returns its parameters."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = open_tokenizer(EMBEDDED)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.model_max_length = 2 * LONGEST
    tokenizer.chat_template = None  # CrossEncoder would make messages of the texts
    tokenizer.save_pretrained(folder)
    sizes = QUICK if options.quick else SIZES[options.model]
    more = {"query_pre_attn_scalar": sizes["head_dim"]} if options.model == "gemma2" else {}
    more |= {"sliding_window": 32} if options.model == "gemma2" and options.quick else {}
    common = {
        "vocab_size": VOCABULARY[options.model],
        "max_position_embeddings": 2 * LONGEST,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(options.model, **{**HEADS[options.model], **sizes, **common, **more})
    config.num_labels = CLASSES
    model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


class Taken(NamedTuple):
    """CPU seconds by arm and repetition, and real tokens of a round in both orders."""

    seconds: dict[str, list[float]]
    tokens: int


def measure(name: str, round_: int, options: argparse.Namespace, pipes: dict[str, Connection]) -> Taken:
    """One round of a workload. Logits are compared before anything is said of seconds."""
    bench = open_bench(name, round_, options.quick, options.rounds)
    workload, names = bench.workload, [arm for arm in bench.workload.arms if arm in pipes]
    seconds: dict[str, list[float]] = {arm: [] for arm in names}
    logits = {arm: np.full((len(workload.rows), 2, CLASSES), np.nan) for arm in names}

    def ask(arm: str, rows: Sequence[int]) -> float:
        pipes[arm].send((name, round_, rows))
        taken: float
        taken, logits[arm][rows] = pipes[arm].recv()
        return taken

    for arm in names:
        ask(arm, workload.shares[-1][:2])  # warms up
    for repetition, share in enumerate(workload.shares):
        turn = (3 * repetition + round_) % len(names)
        for arm in names[turn:] + names[:turn]:
            seconds[arm].append(ask(arm, workload.shuffled[repetition] if arm == "file_order" else share))
    apart = max(float(np.abs(logits[arm] - logits[names[0]]).max()) for arm in names)
    assert apart <= TOLERANCE, f"{name}: the arms' logits differ by {apart}: they do not compute the same"
    print(f"{name}, round {round_}: logits of {len(names)} arms equal to {apart:.1e}", flush=True)
    return Taken(seconds, sum(len(one.ids) for row in bench.encoded for one in row))


# --- memory ----------------------------------------------------------------------------------------------------------


def remember(folder: Path, options: argparse.Namespace, layout: str, budget: int, pipe: Connection) -> None:
    """A process that foretells its peak, scores 4 rows, then 16; answers the three peaks in bytes."""
    from pairclf.inputs.sequences import LargestPass
    from pairclf.model.device_memory import peak_memory
    from pairclf.model.prediction_memory import footprint

    torch.set_num_threads(1)
    quiet()
    bench, scorer = open_bench("lmsys", 0, options.quick, 1), make_scorer(folder, layout)
    lengths = [len(one.ids) for row in bench.encoded[:16] for one in row]
    peaks = [footprint(scorer, LargestPass(max(lengths), min(budget, sum(lengths)), orders=2)).peak]
    for rows in (4, 16):  # the longest are the first
        score_all(scorer, bench.encoded[:rows], budget, once=True)
        peaks.append(peak_memory(torch.device("cpu")))
    pipe.send(peaks)


def measure_memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured peaks by layout and budget. Memory does not mind company: two processes at a time."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    for budget in (options.tokens_per_batch, 8 * options.tokens_per_batch):
        pipes = {}
        for layout in ("packed", "shared"):
            pipes[layout], theirs = context.Pipe()
            context.Process(target=remember, args=(folder, options, layout, budget, theirs), daemon=True).start()
            theirs.close()
        for layout, pipe in pipes.items():
            predicted, fewer, all_ = pipe.recv()
            figures = {"predicted_gb": round(predicted / 1e9, 3), "measured_gb": round(all_ / 1e9, 3)}
            figures["predicted_over_measured"] = round(predicted / all_, 3)
            if budget == options.tokens_per_batch:  # 4 rows do not fill the larger one
                figures["peak_16_over_4_rows"] = round(all_ / fewer, 3)
            found[f"{layout}_{budget}"] = figures
            print(f"memory {layout} {budget}: {figures}", flush=True)
    return found


# --- figures ---------------------------------------------------------------------------------------------------------

RATIOS = {
    "lmsys": [
        *(("pairclf", name) for name in ("file_order", "sorted", "single", "padded", "untrimmed", "packed")),
        ("from_texts", "cross_encoder"),
        ("untrimmed", "padded"),
        ("packed", "untrimmed"),
        ("pairclf_again", "pairclf"),
    ],
    "uniform": [("untrimmed", "padded"), ("packed", "untrimmed"), ("pairclf", "packed"), ("pairclf", "sorted")],
    "instruction": [("pairclf", "sorted"), ("pairclf", "packed"), ("packed", "sorted")],
    "duplicates": [("packed", "each"), ("pairclf", "each")],
}
"""Who is compared with whom: the first is so many times as fast as the second."""


def ratios_of(name: str, rounds: Sequence[Taken]) -> dict[str, Any]:
    """How many times as fast one arm is as another, for the pairs of `RATIOS`."""
    found: dict[str, Any] = {}
    for fast, slow in RATIOS[name]:
        if slow not in rounds[0].seconds:
            continue
        ratio = median(sum(one.seconds[slow]) / sum(one.seconds[fast]) for one in rounds)
        pairs = [pair for one in rounds for pair in zip(one.seconds[slow], one.seconds[fast], strict=True)]
        each = [other / own for other, own in pairs]
        key = "aa" if fast == "pairclf_again" else f"{fast}_over_{slow}"
        # `file_order` has other rows in a repetition.
        spread = {} if slow == "file_order" else {"spread": [round(min(each), 3), round(max(each), 3)]}
        found[key] = {"ratio": round(ratio, 3), **spread} if len(each) > 1 else {"ratio": round(ratio, 3)}
    return found


def report(name: str, rounds: Sequence[Taken]) -> None:
    """Each arm's speed; tokens are real ones, of both orders, and computed by whoever needs to or not."""
    for arm in rounds[0].seconds:
        speed = median(one.tokens / sum(one.seconds[arm]) for one in rounds)
        print(f"{name:11s} {arm:14s} {speed:7.0f} tokens per CPU-second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SIZES], default="llama")
    parser.add_argument("--workload", choices=[*IN, "memory"], help="one of them; without it, all")
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each workload is gone through, with other rows"
    )
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="of pairclf's arms")
    parser.add_argument("--quick", action="store_true", help="a tiny model and tiny rows: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    figures: dict[str, Any] = {"model": options.model}
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_base(Path(folder), options)
        print(f"{options.model}, {parameters:,} parameters, {options.tokens_per_batch} tokens a batch")
        wanted = [options.workload] if options.workload else [*IN, "memory"]
        arms = [name for name in ARMS if any(name in IN.get(workload, ()) for workload in wanted)]
        if find_spec("sentence_transformers") is None and "cross_encoder" in arms:
            arms.remove("cross_encoder")
            print("no arm cross_encoder without sentence-transformers (pip install 'pairclf[bench]')")
        with working(arms, Path(folder), options) as pipes:
            for name in filter(IN.get, wanted):
                rounds = [measure(name, round_, options, pipes) for round_ in range(options.rounds)]
                report(name, rounds)
                figures[name] = ratios_of(name, rounds)
        if "memory" in wanted:
            figures["memory"] = measure_memory(Path(folder), options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
