"""Fine-tuning a ~30M-parameter Llama: pairclf against the ways it is done elsewhere, on the same rows and weights.

    python benchmarks/training.py [--steps 1] [--repetitions 4] [--quick]

Arms, each in a process of its own that lives to the end, one thread, float32, the whole model trained:

random      HF Trainer, 8 rows a batch in random order, padded to the longest
grouped     HF Trainer on the batches of its length-grouped sampler, 8 rows each
single      plain torch, one row at a time without padding, 8 to a step: the strongest peer on a CPU
padded      pairclf, `train.layout=padded`
packed      pairclf, `train.layout=packed`
random_again    the first arm once more: how much two figures differ by chance

All take an AdamW step for 8 rows, at one rate, with one limit of the gradient, and all but `grouped` take the same
steps: their losses must agree, to 1e-5 in the first step, which is of short rows and warms up. `grouped` orders rows
otherwise by its nature. Its sampler is given the whole epoch of 1,600 rows, and each repetition runs some of its
batches, from evenly spaced places in the order of length, so that it sees long and short ones as often as an epoch.

Rows follow the length model of LMSYS data: tokens of the prompt ~ LogNormal(median 22, s 1.56), of the responses ~
LogNormal(median 225, s 0.80, correlation 0.65), 40 of template, cut at 2,048; ids are drawn by lot. Tokens are real
ones, padding is not counted. Process CPU time; in every repetition each arm runs once, in an order that changes; ratios
are medians over repetitions of ratios within one. Memory is the process's peak, and `growth` that peak over what the
process held before its first step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from peers import watched_trainer
from torch import Tensor, nn
from torch.nn import functional

ROWS, BATCH, CLASSES, LEARNING_RATE, CLIP = 1600, 8, 3, 1e-4, 1.0
SIZES: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32_000}
QUICK: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}

Steps = list[list[int]]
"""The rows behind each optimizer step."""
Arm = Callable[[Steps], list[float]]
"""Takes the steps and returns their losses."""


class Rows:
    """Ids and labels of all rows; the same in every process."""

    def __init__(self, quick: bool) -> None:
        random = np.random.default_rng(0)
        longest, scale = (64, 1 / 16) if quick else (2048, 1.0)
        prompts = random.lognormal(np.log(22), 1.56, ROWS)
        sides = 225 * np.exp(0.8 * random.multivariate_normal([0, 0], [[1, 0.65], [0.65, 1]], ROWS))
        lengths = np.minimum(longest, scale * (40 + prompts + sides.sum(axis=1))).astype(int)
        vocabulary = (QUICK if quick else SIZES)["vocab_size"]
        self.ids = [random.integers(5, vocabulary, max(4, length)).astype(np.int32) for length in lengths]
        self.labels: list[int] = random.integers(0, CLASSES, ROWS).tolist()

    @property
    def lengths(self) -> list[int]:
        return [len(one) for one in self.ids]


# --- arms ------------------------------------------------------------------------------------------------------------


def trainer_arm(folder: Path, rows: Rows, options: argparse.Namespace) -> Arm:
    """HF Trainer over the steps in the order they are given."""
    from transformers import LlamaForSequenceClassification, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=CLASSES, pad_token_id=0)
    losses: list[float] = []

    def collate(batch: Sequence[int]) -> dict[str, Tensor]:
        width = max(len(rows.ids[row]) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for place, row in enumerate(batch):
            ids[place, : len(rows.ids[row])] = torch.from_numpy(rows.ids[row])
        labels = torch.tensor([rows.labels[row] for row in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    def run(steps: Steps) -> list[float]:
        losses.clear()
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",  # the order was drawn before
            max_steps=len(steps),
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
        flat: Any = [row for step in steps for row in step]
        watched_trainer(losses)(model=model, args=arguments, train_dataset=flat, data_collator=collate).train()
        return list(losses)

    return run


def single_arm(folder: Path, rows: Rows, options: argparse.Namespace) -> Arm:
    """One row at a time: nothing is padded, and each step's gradient is the mean of its rows'."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=CLASSES, pad_token_id=0)
    model.train()

    def run(steps: Steps) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        losses = []
        for step in steps:
            total = 0.0
            for row in step:
                logits = model(input_ids=torch.from_numpy(rows.ids[row]).long()[None], use_cache=False).logits
                loss = functional.cross_entropy(logits, torch.tensor([rows.labels[row]])) / len(step)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return losses

    return run


def pairclf_arm(layout: str) -> Callable[[Path, Rows, argparse.Namespace], Arm]:
    def make(folder: Path, rows: Rows, options: argparse.Namespace) -> Arm:
        from safetensors import safe_open

        from pairclf.approaches.finetune.distributed import make_accelerator
        from pairclf.approaches.finetune.step import accumulate, make_examples, optimizer_step
        from pairclf.approaches.finetune.train import construct
        from pairclf.config import resolve
        from pairclf.inputs.render import Encoded
        from pairclf.model.engine import build
        from pairclf.task import Row

        config = resolve(
            {
                "model": {"base": str(folder), "quantization": "none", "lora": None},
                "train": {
                    "layout": layout,
                    "global_batch_size": BATCH,
                    "tokens_per_batch": options.tokens_per_batch,
                    "learning_rate": LEARNING_RATE,
                    "weight_decay": 0.0,
                    "max_grad_norm": CLIP,
                    "swap": "none",
                },
            }
        )
        accelerator = make_accelerator(config)
        classifier = build(config, accelerator.device)
        with safe_open(folder / "model.safetensors", "pt") as weights, torch.no_grad():
            head: Any = classifier.head
            head.weight.copy_(weights.get_tensor("score.weight"))
            head.bias.zero_().requires_grad_(False)  # the others have none
        encoded = [(Encoded(ids, (), {}),) * 2 for ids in rows.ids]
        fields = dict.fromkeys(config.task.fields, ("",))
        targets = np.eye(CLASSES)[rows.labels].tolist()
        labelled = [Row(str(number), fields, tuple(target)) for number, target in enumerate(targets)]
        examples = make_examples(labelled, encoded, config)
        classifier.train()

        def run(steps: Steps) -> list[float]:
            learner = construct(config, examples, classifier, accelerator)
            losses = []
            for number, step in enumerate(steps, start=1):
                budget = config.train.tokens_per_batch
                outcome = accumulate(learner, np.array(step), number, budget)
                assert outcome is not None
                optimizer_step(learner, config.train.max_grad_norm, outcome.loss)
                losses.append(outcome.loss)
            return losses

        return run

    return make


ARMS: dict[str, Callable[[Path, Rows, argparse.Namespace], Arm]] = {
    "random": trainer_arm,
    "grouped": trainer_arm,
    "single": single_arm,
    "padded": pairclf_arm("padded"),
    "packed": pairclf_arm("packed"),
    "random_again": trainer_arm,
}


# --- processes -------------------------------------------------------------------------------------------------------


def work(name: str, folder: Path, options: argparse.Namespace, pipe: Connection) -> None:
    """An arm's process: takes lists of steps until it gets None; answers CPU seconds, losses and memory in bytes."""
    torch.set_num_threads(1)
    arm = ARMS[name](folder, Rows(options.quick), options)
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    pipe.send("ready")
    while (steps := pipe.recv()) is not None:
        start = time.process_time()
        losses = arm(steps)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, losses, peak, peak - resident))
        # What is free goes back, so that six waiting processes do not hold the memory of their peaks.
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def make_base(folder: Path, quick: bool) -> int:
    """A randomly filled model with a head, saved; returns its parameters."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = QUICK if quick else SIZES
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": sizes["hidden_size"] // 6}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=4096, pad_token_id=0)
    config.num_labels = CLASSES
    model = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


def plan(rows: Rows, steps: int, repetitions: int) -> tuple[list[Steps], list[Steps]]:
    """For each repetition the steps of the random arms, and those of the length-grouped one."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    order = np.random.default_rng(1).permutation(ROWS).tolist()
    drawn = [order[start : start + BATCH] for start in range(0, ROWS, BATCH)]
    random = [drawn[number * steps : (number + 1) * steps] for number in range(repetitions)]
    sampler = LengthGroupedSampler(BATCH, lengths=rows.lengths, generator=torch.Generator().manual_seed(1))
    flat = list(sampler)
    batches = [flat[start : start + BATCH] for start in range(0, ROWS, BATCH)]
    batches.sort(key=lambda batch: sum(rows.lengths[row] for row in batch))
    places = [round((number + 0.5) * len(batches) / (steps * repetitions)) for number in range(steps * repetitions)]
    spread = [batches[place] for place in places]
    grouped = [spread[number::repetitions] for number in range(repetitions)]
    return random, grouped


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Real tokens per CPU-second by arm and repetition; and each arm's losses and memory."""
    rows = Rows(options.quick)
    random, grouped = plan(rows, options.steps, options.repetitions)
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    for name in ARMS:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(name, folder, options, theirs), daemon=True)
        process.start()
        theirs.close()  # so that `recv` fails if the process dies
        workers[name] = process, ours
        assert ours.recv() == "ready"
    speed: dict[str, list[float]] = {name: [] for name in ARMS}
    found: dict[str, Any] = {name: {"losses": []} for name in ARMS}
    names = list(ARMS)
    shortest = sorted(range(ROWS), key=rows.lengths.__getitem__)[:BATCH]
    for name in names:  # warms up, on the same rows for all
        workers[name][1].send([shortest])
        found[name]["losses"] += workers[name][1].recv()[1]
    for repetition in range(options.repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            steps = (grouped if name == "grouped" else random)[repetition]
            pipe = workers[name][1]
            pipe.send(steps)
            seconds, losses, peak, growth = pipe.recv()
            tokens = sum(rows.lengths[row] for step in steps for row in step)
            speed[name].append(tokens / seconds)
            found[name]["losses"] += losses
            found[name] |= {"peak": peak, "growth": growth}
            print(
                f"{repetition} {name:13s} {tokens:6d} tokens in {seconds:6.1f} CPU-s, peak {peak / 1e9:.2f} GB",
                flush=True,
            )
    for process, pipe in workers.values():
        pipe.send(None)
        process.join()
    return speed, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of each arm in a repetition")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="of pairclf's arms")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps, once: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repetitions = 2, 1
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_base(Path(folder), options.quick)
        print(f"{parameters:,} parameters, {options.steps} steps of {BATCH} rows, {options.repetitions} repetitions")
        speed, found = measure(options, Path(folder))

    def ratio(fast: str, slow: str) -> float:
        return round(median(one / other for one, other in zip(speed[fast], speed[slow], strict=True)), 3)

    for name in ARMS:
        figures = found[name]
        memory = f"peak {figures['peak'] / 1e9:5.2f} GB, growth {figures['growth'] / 1e9:5.2f} GB"
        print(f"{name:13s} {median(speed[name]):7.0f} tokens per CPU-second, {memory}")
    alike = [found[name]["losses"] for name in ARMS if name != "grouped"]
    first = max(one[0] for one in alike) - min(one[0] for one in alike)
    assert first <= 1e-5, f"the arms' first losses differ by {first}: they do not compute the same"
    apart = float(np.ptp(np.array(alike), axis=0).max())
    print(
        json.dumps(
            {
                **{f"packed_over_{name}": ratio("packed", name) for name in ("random", "grouped", "single", "padded")},
                "padded_over_random": ratio("padded", "random"),
                "peak_over_random": round(found["packed"]["peak"] / found["random"]["peak"], 3),
                "growth_over_random": round(found["packed"]["growth"] / found["random"]["growth"], 3),
                "first_losses_apart": first,
                "losses_apart": apart,
                "aa": ratio("random_again", "random"),
            }
        )
    )


if __name__ == "__main__":
    main()
