"""The three ways to logits of an encoder-decoder, on the synthetic arena: the same random T5, rows, seeds and steps.

    python benchmarks/encoder_decoders.py --rows 4000 --epochs 2

- head: a head of our own on the decoder's first state
- label_tokens: the LM head's rows of one word a class, on the same state
- mean: a head on the mean of the encoder's states; no decoder is loaded

Half of the layers are the decoder's, which computes one token of a row. Everything is trained; a fold of five is held
out. Prints a line for each way and seed, and last a line of JSON: log loss and accuracy of the held-out rows, CPU
seconds of training and scoring, and parameters; and the paired differences of the log loss from that of the class
frequencies and from that of the head, with their 95% intervals. Below 0, the way is better. Nothing is pretrained: the
figures compare ways, not models.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from pairclf.bundles.base import resolve_base
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, resolve
from pairclf.data.scores import class_matrix, read_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.model.backbone import empty_model, read_settings
from pairclf.run import OOF, Paths, labelled_rows, output_of
from pairclf.runs.fit import fit
from pairclf.scores.intervals import difference
from pairclf.scores.metrics import Floats, row_losses

WAYS: dict[str, dict[str, Any]] = {
    "head": {},
    "label_tokens": {
        "readout": "label_tokens",
        "label_words": {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "C"},
    },
    "mean": {"pooling": "mean"},
}


def make_base(folder: Path, *, width: int, layers: int, seed: int) -> None:
    """A random T5 v1.1, and the tokenizer of an embedded base, with `<eos>` behind each text in place of `<bos>`."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("embedded:llama-tiny"))
    (folder / "tokenizer.json").write_text(_closing(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}),
        encoding="utf-8",
    )
    torch.manual_seed(seed)
    settings = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(settings).save_pretrained(folder)


def _closing(tokenizer: Any) -> str:
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    closing = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    named = {"<eos>": {"id": "<eos>", "ids": [tokenizer.convert_tokens_to_ids("<eos>")], "tokens": ["<eos>"]}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence, closing],
        "pair": [sequence, closing, {"Sequence": {"id": "B", "type_id": 0}}, closing],
        "special_tokens": named,
    }
    return json.dumps(settings)


def config_of(way: str, base: Path, rows: Path, output: Path, options: argparse.Namespace, seed: int) -> Config:
    """The settings of one training."""
    return resolve({
        "seed": seed,
        "output_dir": str(output),
        "data": {"folder": str(rows), "train": ["train.csv"]},
        "folds": {"n_splits": 5},
        "inputs": {"max_length": options.max_length},
        "model": {"base": str(base), "quantization": "none", "lora": None, **WAYS[way]},
        "train": {
            "layout": "padded",
            "num_train_epochs": options.epochs,
            "global_batch_size": 16,
            "per_device_train_batch_size": 16,
            "tokens_per_batch": 1024,
            "learning_rate": options.learning_rate,
        },
    })  # fmt: skip


def losses_of(config: Config, prior: Sequence[float]) -> tuple[Floats, Floats]:
    """`(N,)` each, of the held-out rows: of the trained model, and of the class frequencies."""
    scores = read_scores(Paths(output_of(config), 0).folder / OOF, config.task)
    frame = labelled_rows(config).select("id", "target")
    targets = np.array(scores.select("id").join(frame, on="id", how="left", maintain_order="left")["target"].to_list())
    return row_losses(class_matrix(scores, config.task), targets), row_losses(np.tile(prior, (len(scores), 1)), targets)


def compared(losses: Floats, others: Floats) -> list[float]:
    """The mean of `losses - others`, and the bounds of its interval."""
    gap = difference(losses, others, np.arange(len(losses)))
    return [round(value, 4) for value in (gap.value, gap.low, gap.high)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train each way with each seed, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the encoder, and of the decoder")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_lmsys(generate(options.rows, seed=0), folder, n_test=20)
        for seed in range(options.seeds):
            base = folder / f"base{seed}"
            base.mkdir()
            of_head = np.empty(0)
            make_base(base, width=options.width, layers=options.layers, seed=seed)
            for way in WAYS:
                config = config_of(way, base, folder, folder / f"{way}{seed}", options, seed)
                start = time.process_time()
                bundle = open_bundle(fit(config, 0))
                seconds = time.process_time() - start
                model = empty_model(read_settings(str(base), config.model.pooling))
                losses, of_prior = losses_of(config, bundle.manifest.prior)
                of_head = losses if way == "head" else of_head
                gaps = {"over_prior": compared(losses, of_prior), "over_head": compared(losses, of_head)}
                metrics = {name: round(bundle.manifest.metrics[name], 4) for name in ("log_loss", "accuracy")}
                size = sum(weight.numel() for weight in model.parameters())
                results.append(
                    {"way": way, "seed": seed, **metrics, **gaps, "cpu_seconds": round(seconds), "weights": size}
                )
                print(results[-1], flush=True)
    print(json.dumps({**vars(options), "results": results}))


if __name__ == "__main__":
    main()
