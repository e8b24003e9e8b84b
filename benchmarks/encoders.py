"""MiniLM in both orders of a row: pairclf against sentence-transformers' CrossEncoder and HF Trainer.

    python benchmarks/encoders.py MINILM [--workload lmsys|short] [--part scoring|training]
    python benchmarks/encoders.py --quick

MINILM is a folder with a BERT and its tokenizer (all-MiniLM-L6-v2: 6 layers, 22.7M weights, 512 positions); `--quick`
takes a tiny model, with a vocabulary of the synthetic arena.

Scoring, from texts on:

cross_encoder        CrossEncoder.predict, 32 sequences a batch, sorted by length by itself
pairclf              `packed`, the last layer at the read tokens
untrimmed            `packed`, the last layer for all tokens
padded               `predict.layout=padded`
cross_encoder_again  the first once more: how much two figures differ by chance

In a repetition each arm scores the same 16 rows in both orders: neighbours in the order of length of a file of 25,000,
so that a sort by length is seen at its best, from evenly spread places of it. Training, all weights, 8 rows a step in
random order: `trainer` (HF Trainer, padded to the longest), `packed`, `padded`, and `trainer_again`.

The peers' pooler, a layer of BERT's own that pairclf leaves out, is taken out of them: the same function is computed.
No logit may differ by more than 1e-4, no first loss by more than 1e-5. Workloads: `lmsys`, the length model of
`benchmarks/inference.py` cut at 512 tokens, as BERT has no more positions; `short`, its lengths divided by 4.

One thread, float32, process CPU time, arms in an order that changes; a ratio is the median over repetitions of ratios
within one, `spread` its range. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from inference import FILE, lmsys_lengths, make_rows, quiet, texts_of
from numpy.typing import NDArray
from peers import watched_trainer
from torch import Tensor, nn

from pairclf.config import Config, resolve
from pairclf.model.inputs import open_inputs
from pairclf.task import Row

LONGEST, SHARE, BATCH, STEPS, CLASSES, LEARNING_RATE, CLIP = 512, 16, 8, 3, 3, 1e-4, 1.0
SCORED, TRAINED = 5, 3  # repetitions
SCALE = {"lmsys": 1.0, "short": 0.25}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Logits = NDArray[np.float64]
Score = Callable[[Sequence[Row]], Logits]
"""Rows -> logits `(N, 2, C)`."""
Train = Callable[[Sequence[Row]], list[float]]
"""Optimizer steps of 8 rows each -> their losses."""


class FirstState(nn.Module):
    """In place of BERT's pooler: the state of [CLS] as it is."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, 0]


def make_tiny(folder: Path) -> None:
    """A BERT's config and its tokenizer, made of the synthetic arena's texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertTokenizer

    from pairclf.demo.arena import generate

    texts = [turn for row in generate(400, seed=0).rows for turn in (*row.prompt, *row.response_a) if turn]
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2000, show_progress=False)
    BertTokenizer(vocab=tokenizer.get_vocab()).save_pretrained(folder)
    BertConfig(vocab_size=tokenizer.get_vocab_size(), **TINY).save_pretrained(folder)


def make_base(source: Path, folder: Path, *, quick: bool) -> None:
    """The model with a random head, and its tokenizer as pairclf reads it."""
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    from pairclf.inputs.tokenise import add_line_break

    torch.manual_seed(0)
    settings = AutoConfig.from_pretrained(source, num_labels=CLASSES, **NO_DROPOUT)
    settings.classifier_dropout = 0.0
    if quick:
        model = BertForSequenceClassification(settings)
    else:
        model = BertForSequenceClassification.from_pretrained(source, config=settings)
    nn.init.normal_(model.classifier.weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    add_line_break(tokenizer, settings.vocab_size)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = LONGEST
    tokenizer.save_pretrained(folder)


def config_of(folder: Path, layout: str) -> Config:
    train = {
        "layout": layout,
        "global_batch_size": BATCH,
        "tokens_per_batch": 2048,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "swap": "none",
    }
    model = {"base": str(folder), "quantization": "none", "lora": None}
    return resolve({"inputs": {"max_length": LONGEST}, "model": model, "train": train})


# --- rows ------------------------------------------------------------------------------------------------------------


def rows_of(workload: str, folder: Path) -> tuple[list[list[Row]], list[list[Row]]]:
    """Rows to be scored, and rows to be trained on, of each repetition."""
    from transformers import AutoTokenizer

    random = np.random.default_rng(7)
    lengths = lmsys_lengths(random, SCALE[workload], LONGEST - 64)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = [f" {word}" for word in sorted(vocabulary) if word.isascii() and word.isalpha() and word.islower()]
    places = [round((number + 0.5) * FILE / SCORED) - SHARE // 2 for number in range(SCORED)][::-1]
    scored = [make_rows(lengths[place : place + SHARE], words, random) for place in places]
    drawn = [make_rows(lengths[random.integers(0, FILE, STEPS * BATCH)], words, random) for _ in range(TRAINED)]
    return scored, [[label(row, random) for row in rows] for rows in drawn]


def label(row: Row, random: np.random.Generator) -> Row:
    return Row(row.id, row.fields, tuple(np.eye(CLASSES)[random.integers(CLASSES)].tolist()))


# --- scoring ---------------------------------------------------------------------------------------------------------


def cross_encoder(folder: Path) -> Score:
    from sentence_transformers import CrossEncoder  # type: ignore[import-not-found, unused-ignore]
    from tokenizers.processors import TemplateProcessing

    model = CrossEncoder(str(folder), device="cpu", max_length=LONGEST, local_files_only=True)
    without_pooler(model)
    # A pair of texts is one text after another, as pairclf has it; when it is loaded, BERT's own way is restored.
    ends = [(name, model.tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=ends
    )
    config, _, builder, _ = open_inputs(config_of(folder, "packed"))

    def score(rows: Sequence[Row]) -> Logits:
        pairs = [pair for row in rows for pair in texts_of(row, config)]
        scores = model.predict(pairs, batch_size=32, show_progress_bar=False, activation_fn=nn.Identity())
        return np.asarray(scores, dtype=np.float64).reshape(len(rows), 2, CLASSES)

    def check(rows: Sequence[Row]) -> Logits:
        for row, encoded in zip(rows[:2], builder.encode(rows[:2]), strict=True):
            theirs = model.preprocess([texts_of(row, config)[0]])["input_ids"][0].numpy()
            assert np.array_equal(theirs, encoded[0].ids), "CrossEncoder's ids are not pairclf's"
        return score(rows)

    check_once = iter([check])
    return lambda rows: next(check_once, score)(rows)


def without_pooler(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "BertModel":
            module.pooler = FirstState()


def with_head_of(folder: Path, layout: str) -> Any:
    """pairclf's classifier with the head that the others have."""
    from safetensors import safe_open

    from pairclf.model.engine import build

    classifier = build(config_of(folder, layout), torch.device("cpu"))
    with safe_open(folder / "model.safetensors", "pt") as weights, torch.no_grad():
        head: Any = classifier.head
        head.weight.copy_(weights.get_tensor("classifier.weight"))
        head.bias.copy_(weights.get_tensor("classifier.bias"))
    return classifier


def pairclf_score(layout: str, *, trim: bool = True) -> Callable[[Path], Score]:
    def make(folder: Path) -> Score:
        from pairclf.model.scoring import ClassifierScorer, _batches, items_of

        builder = open_inputs(config_of(folder, "packed")).builder
        scorer = ClassifierScorer(with_head_of(folder, "packed").eval(), layout)
        scorer.trim = scorer.trim and trim

        def score(rows: Sequence[Row]) -> Logits:
            items = items_of(builder.encode(rows), orders=2)
            logits = np.empty((len(items), CLASSES))
            for members in _batches(items, layout, 2048):
                logits[members], _ = scorer([items[member] for member in members])
            return logits.reshape(len(rows), 2, CLASSES)

        return score

    return make


SCORING: dict[str, Callable[[Path], Score]] = {
    "cross_encoder": cross_encoder,
    "pairclf": pairclf_score("packed"),
    "untrimmed": pairclf_score("packed", trim=False),
    "padded": pairclf_score("padded"),
    "cross_encoder_again": cross_encoder,
}


# --- training --------------------------------------------------------------------------------------------------------


def trainer(folder: Path) -> Train:
    """HF Trainer over the rows in the order they are given."""
    from transformers import BertForSequenceClassification, TrainingArguments

    model = BertForSequenceClassification.from_pretrained(folder)
    without_pooler(model)
    builder = open_inputs(config_of(folder, "packed")).builder
    losses: list[float] = []

    def collate(batch: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True)
        labels = torch.tensor([label for _, label in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}  # 0 is [PAD]

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        optim="adamw_torch",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
    )

    def train(rows: Sequence[Row]) -> list[float]:
        losses.clear()
        encoded = builder.encode(rows)
        data: Any = [
            (torch.from_numpy(orders[0].ids).long(), int(np.argmax(row.target or ())))
            for orders, row in zip(encoded, rows, strict=True)
        ]
        watched_trainer(losses)(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
        return list(losses)

    return train


def pairclf_train(layout: str) -> Callable[[Path], Train]:
    def make(folder: Path) -> Train:
        from pairclf.approaches.finetune.distributed import make_accelerator
        from pairclf.approaches.finetune.step import accumulate, make_examples, optimizer_step
        from pairclf.approaches.finetune.train import construct

        config = config_of(folder, layout)
        accelerator, builder = make_accelerator(config), open_inputs(config).builder
        classifier = with_head_of(folder, layout).train()

        def train(rows: Sequence[Row]) -> list[float]:
            examples = make_examples(rows, builder.encode(rows), config)
            learner, losses = construct(config, examples, classifier, accelerator), []
            for number, step in enumerate(np.arange(len(rows)).reshape(STEPS, BATCH), start=1):
                outcome = accumulate(learner, step, number, config.train.tokens_per_batch)
                assert outcome is not None
                optimizer_step(learner, CLIP, outcome.loss)
                losses.append(outcome.loss)
            return losses

        return train

    return make


TRAINING: dict[str, Callable[[Path], Train]] = {
    "trainer": trainer,
    "packed": pairclf_train("packed"),
    "padded": pairclf_train("padded"),
    "trainer_again": trainer,
}


# --- figures ---------------------------------------------------------------------------------------------------------


def measure(
    arms: dict[str, Callable[[Any], Any]], shares: list[list[Row]], warm_up: list[Row], folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """CPU seconds and results of each arm by repetition; the first result is of the rows that warm up."""
    made = {name: make(folder) for name, make in arms.items()}
    results: dict[str, list[Any]] = {name: [arm(warm_up)] for name, arm in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for repetition, rows in enumerate(shares):
        turn = 2 * repetition % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.process_time()
            results[name].append(made[name](rows))
            seconds[name].append(time.process_time() - start)
        print(repetition, {name: round(taken[-1], 2) for name, taken in seconds.items()}, flush=True)
    return seconds, results


def ratio(seconds: dict[str, list[float]], fast: str, slow: str) -> dict[str, Any]:
    each = [other / own for other, own in zip(seconds[slow], seconds[fast], strict=True)]
    return {"ratio": round(median(each), 3), "spread": [round(min(each), 3), round(max(each), 3)]}


def compare_scoring(shares: list[list[Row]], folder: Path) -> dict[str, Any]:
    """Logits are compared before anything is said of seconds."""
    seconds, logits = measure(SCORING, shares, shares[-1][:2], folder)
    apart = max(
        float(np.abs(one - other).max())
        for arm in logits.values()
        for one, other in zip(arm, logits["cross_encoder"], strict=True)
    )
    assert apart <= 1e-4, f"the arms' logits differ by {apart}: they do not compute the same"
    slower = ("cross_encoder", "untrimmed", "padded")
    return {
        "logits_apart": apart,
        **{f"pairclf_over_{slow}": ratio(seconds, "pairclf", slow) for slow in slower},
        "aa": ratio(seconds, "cross_encoder_again", "cross_encoder"),
    }


def compare_training(shares: list[list[Row]], folder: Path) -> dict[str, Any]:
    """Losses are compared before anything is said of seconds."""
    seconds, losses = measure(TRAINING, shares, shares[0], folder)
    first = float(np.ptp([arm[0][0] for arm in losses.values()]))
    assert first <= 1e-5, f"the arms' first losses differ by {first}: they do not compute the same"
    return {
        "first_losses_apart": first,
        "losses_apart": float(np.ptp(np.array(list(losses.values())), axis=0).max()),
        **{f"packed_over_{slow}": ratio(seconds, "packed", slow) for slow in ("trainer", "padded")},
        "aa_training": ratio(seconds, "trainer_again", "trainer"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a folder of a BERT")
    parser.add_argument("--workload", choices=[*SCALE], default="lmsys")
    parser.add_argument("--part", choices=["scoring", "training"], help="one of them; without it, both")
    parser.add_argument("--quick", action="store_true", help="a tiny model in its place: does it run?")
    options = parser.parse_args()
    if (options.model is None) != options.quick:
        parser.error("give either a folder, or --quick")
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "base")
        if options.quick:
            make_tiny(Path(name, "tiny"))
        make_base(options.model or Path(name, "tiny"), folder, quick=options.quick)
        scored, trained = rows_of(options.workload, folder)
        figures: dict[str, Any] = {"workload": options.workload}
        if options.part != "training":
            figures |= compare_scoring(scored, folder)
        if options.part != "scoring":
            figures |= compare_training(trained, folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
