"""Everything about pairclf that only a GPU can show, in parts, within minutes, with nothing to download.

    python benchmarks/gpu.py [--minutes 8] [--parts forward training] [--out runs/gpu] [--bases /dev/shm/bases]
    python benchmarks/gpu.py --miniature        # tiny shapes, on a CPU too: does every part run?

Models have random weights in the shapes of Gemma-2-9b and SmolLM2-135M; they are written to `--bases` once (19 GB).
Rows have the lengths of LMSYS data, cut at 2,048 tokens, and both orders of a row begin with its prompt.

tests           the tests marked `gpu`
layouts         padded, packed and shared against one row at a time, in three dtypes, with every kernel for packed rows
                that runs here (flash-attn, torch's own varlen, one sequence after the other); and a wrong topology
forward         Gemma-2-9b: tokens a second of a prediction in bfloat16 and in NF4, memory foretold and taken
training        Gemma-2-9b, `configs/lmsys/gemma2-9b-qlora.yaml`: tokens a second against HF Trainer with PEFT on the
                same rows, each with gradient checkpointing, and pairclf without; memory foretold and taken
float16         Gemma-2's layers with capped scores in float16 against float32; activations that overflow are rescued
memory          SmolLM2-135M: what the fit check foretold and what was taken, for trainings and predictions
out_of_memory   memory is taken away until passes fail: a step is repeated in smaller batches with the same gradients, a
                row that can't be split ends in our error, and a scorer goes on after a failed batch
replicas        two workers on one GPU against one: equal logits, and tokens a second

A part runs in a process of its own, which is ended at its limit. It leaves one line of JSON in `results.jsonl` in
`--out`, and its output in `PART.log`. A part that fails has `error` in its line, and the next one goes on. The same
command runs what has no line without an error. The last line is one JSON object with all lines. Nothing of it was run
on a GPU yet; docs/performance.md says what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from accelerate.state import AcceleratorState
from peers import watched_trainer
from safetensors import safe_open
from steps import Figures, Run, Step, run_steps
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from pairclf.approaches.finetune.distributed import make_accelerator
from pairclf.approaches.finetune.resource_forecast import forecast_resources
from pairclf.approaches.finetune.step import (
    TrainState,
    accumulate,
    accumulate_with_oom_retry,
    make_examples,
    optimizer_step,
)
from pairclf.approaches.finetune.train import construct
from pairclf.approaches.torch_models import DeviceScorer
from pairclf.bundles.bundle import write_bundle
from pairclf.config import Config, load_config, resolve
from pairclf.errors import ModelError
from pairclf.inference.messages import BatchScored, Event, Job, RowOrders, WorkerFailure, WorkerReady
from pairclf.inference.pool import ProcessPool, WorkerModel
from pairclf.inputs.render import Encoded
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.model import attention
from pairclf.model.attention import KERNELS, ScoreOptions, pick_kernel
from pairclf.model.backbone import load_tokenizer, pick_device, weight_files
from pairclf.model.batch import Batch, Topology, end_to_end
from pairclf.model.device_memory import forget_peak, free_memory, memory_now, peak_memory
from pairclf.model.engine import Classifier, build, build_frozen
from pairclf.model.isolation import TOLERANCE
from pairclf.model.layouts import packed, padded, shared
from pairclf.model.prediction_memory import footprint
from pairclf.model.scoring import ClassifierScorer, items_of
from pairclf.model.weights import save_weights
from pairclf.own_files import shipped
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, Row

ROOT = Path(__file__).parents[1]
APPROACH = "pairclf.approaches.torch_models"
CLASSES, LONGEST = len(LMSYS.classes), 2048
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GEMMA_9B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 256_000,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
}
"""https://huggingface.co/google/gemma-2-9b/blob/main/config.json"""
SMOLLM: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "rope_theta": 100_000.0,
}
"""https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json"""
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-2-9b": ("gemma2", GEMMA_9B),
    "gemma-2-9b-4-layers": ("gemma2", {**GEMMA_9B, "num_hidden_layers": 4, "sliding_window": 512}),
    "smollm2-135m": ("llama", SMOLLM),
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "vocab_size": 4096,
    "sliding_window": 32,
}
"""In place of a shape's own sizes, in miniature."""
ENOUGH_WITHOUT_CHECKPOINTING = 100e9
"""Bytes of a GPU that holds the activations of 8,192 tokens of Gemma-2-9b, about 64 GB, beside the model."""


class PartError(Exception):
    """What a part looks at is not as it should be."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise PartError(what)


# --- models and rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where the models are, and whether they are tiny."""

    bases: Path
    miniature: bool

    @property
    def device(self) -> torch.device:
        return pick_device()

    def base(self, shape: str) -> Path:
        """The folder of a base of this shape with a head; made by the first part that asks."""
        folder = self.bases / (f"{shape}-miniature" if self.miniature else shape)
        if folder.exists():
            return folder
        kind, sizes = SHAPES[shape]
        tiny = {name: TINY[name] for name in sizes if name in TINY} if self.miniature else {}
        settings = AutoConfig.for_model(kind, **{**sizes, **tiny}, max_position_embeddings=8192, pad_token_id=0)
        settings.num_labels = CLASSES
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        new = folder.with_suffix(".new")  # `atomic_folder` would wait until 19 GB are on the disk
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, max_shard_size="5GB")
        new.rename(folder)
        return folder

    def encoded(self, rows: int, seed: int = 0) -> list[tuple[Encoded, ...]]:
        """Rows in both orders: 40 tokens of a template with the prompt, then the responses.

        Tokens of the prompt ~ LogNormal(median 22, s 1.56), of the responses ~ LogNormal(median 225, s 0.80,
        correlation 0.65).
        """
        random = np.random.default_rng(seed)
        scale, longest = (1 / 16, 96) if self.miniature else (1.0, LONGEST)
        prompts = 40 + random.lognormal(np.log(22), 1.56, rows)
        sides = 225 * np.exp(0.8 * random.multivariate_normal([0, 0], [[1, 0.65], [0.65, 1]], rows))
        lengths = scale * np.column_stack([prompts, sides])
        lengths *= np.minimum(1, longest / lengths.sum(axis=1))[:, None]
        vocabulary = TINY["vocab_size"] if self.miniature else SMOLLM["vocab_size"]
        made = []
        for sizes in np.maximum(2, lengths.astype(int)).tolist():
            prompt, a, b = (random.integers(1, vocabulary, size, dtype=np.int32) for size in sizes)
            ids = (np.concatenate([prompt, a, b]), np.concatenate([prompt, b, a]))
            made.append(tuple(Encoded(one, (), {}) for one in ids))
        return made


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scored_model(bench: Bench, shape: str, dtype: torch.dtype | None = None, quantization: str = "none") -> Classifier:
    """A base of this shape as a prediction loads it, with the head that lies beside it."""
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    model = {"base": str(bench.base(shape)), "quantization": quantization, "dtype": name, "head_bias": False}
    classifier = build_frozen(resolve({"model": model}), bench.device, None, training=False).eval()
    take_head(classifier, bench.base(shape))
    return classifier


def take_head(classifier: Classifier, base: Path) -> None:
    """The head that transformers' class has saved with its base."""
    for path in weight_files(str(base)):
        with safe_open(path, "pt") as file, torch.no_grad():
            if "score.weight" in file.keys():  # noqa: SIM118
                head: Any = classifier.head
                head.weight.copy_(file.get_tensor("score.weight"))


def tokens_of(items: Sequence[Item]) -> int:
    return sum(len(item.ids) for item in items)


def apart(logits: Floats, others: Floats) -> float:
    """The largest difference, as a part of the spread of the others."""
    return float(np.abs(logits - others).max() / others.std())


# --- parts -----------------------------------------------------------------------------------------------------------


def run_tests(bench: Bench) -> Figures:
    """The tests marked `gpu`; in miniature those of one file, which skip themselves without a GPU."""
    paths = sorted(
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    figures = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    require(done.returncode == 0, f"pytest -m gpu: exit code {done.returncode}: {figures}")
    require(bench.miniature or figures.get("passed", 0) > 0, f"pytest -m gpu: none passed: {figures}")
    return figures


def torch_varlen(query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions, topology: Topology) -> Tensor:
    """A kernel for packed rows that needs no further package; it caps no scores, and drops none."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = attention._varlen(topology, query.device)
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (T, heads, D)
    if lengths.gather is not None:
        key, value = key[lengths.gather], value[lengths.gather]
    window = attention._flash_window(scores)
    out = varlen_attn(
        query,
        key,
        value,
        lengths.queries,
        lengths.keys,
        *lengths.longest,
        scale=scores.scaling,
        window_size=(window[0], 0) if scores.causal else window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def kernels_for(bench: Bench, classifier: Classifier) -> list[str]:
    """The kernels that run a model here: the loop, the one that `pick_kernel` takes, and torch's varlen."""
    settings: Any = classifier.backbone.config
    names = dict.fromkeys(["loop", pick_kernel(bench.device, classifier.dtype, settings.head_dim)[0]])
    capped = getattr(settings, "attn_logit_softcapping", None) is not None
    if bench.device.type == "cuda" and classifier.dtype != torch.float32 and not capped:
        names["torch_varlen"] = None
    return [*names]


def one_topology(batch: Batch) -> Batch:
    """Wrong: all sequences of a packed row as one, so that each sees those before it."""
    told = batch.inputs["topology"]
    assert isinstance(told, Topology)
    paths = tuple(((0, path[-1][1]),) for path in told.paths)
    topology = replace(end_to_end([paths[-1][0][1]]), paths=paths)
    return replace(batch, inputs={**batch.inputs, "topology": topology})


def compare_layouts(bench: Bench) -> Figures:
    """Each layout's logits against one row at a time in the same dtype, as parts of the logits' spread."""
    found: Figures = {}
    items = items_of(bench.encoded(8), orders=2)
    for shape in ("smollm2-135m", "gemma-2-9b-4-layers"):
        for dtype in DTYPES:
            classifier = scored_model(bench, shape, dtype)
            trimmed = {layout: classifier.why_not_trim(layout) is None for layout in ("padded", "packed", "shared")}

            @torch.inference_mode()
            def logits(batch: Batch, *, trim: bool, classifier: Classifier = classifier) -> Floats:
                given = batch.to(classifier.device)
                values: Floats = (
                    classifier(given.inputs, given.read_at, given.lengths, trim=trim).double().cpu().numpy()
                )
                return values

            alone = np.concatenate([logits(padded([item]), trim=False) for item in items])
            differences = {"padded": apart(logits(padded(items), trim=False), alone)}
            for kernel in kernels_for(bench, classifier):
                with patch.object(attention, "pick_kernel", lambda *_, kernel=kernel: (kernel, "as asked")):
                    for name, lay_out in (("packed", packed), ("shared", shared)):
                        values = logits(lay_out(items), trim=trimmed[name])
                        differences[f"{name}, {kernel}"] = apart(values, alone)
            key = f"{shape}, {str(dtype).removeprefix('torch.')}"
            found[key] = {name: float(f"{value:.1e}") for name, value in differences.items()}
            print(key, found[key], flush=True)
            worst = max(differences, key=differences.__getitem__)
            require(differences[worst] <= TOLERANCE[dtype], f"{key}: {worst} is off by {differences[worst]:.2g}")
            if dtype == torch.float32:
                wrong = apart(logits(one_topology(packed(items)), trim=False), alone)
                found[key]["wrong"] = float(f"{wrong:.1e}")
                require(wrong > 10 * TOLERANCE[dtype], f"{key}: a wrong topology is off by {wrong:.2g} alone")
            del classifier, logits
            free_memory()
    return found


def measure_forward(bench: Bench) -> Figures:
    """Passes of 16,384 tokens over rows of all lengths, longest first, as a prediction makes them."""
    budget, rows = (256, 16) if bench.miniature else (16_384, 80)
    bench.base("gemma-2-9b")  # whose making is not to count as memory of a prediction
    items = sorted(items_of(bench.encoded(rows), orders=2), key=lambda item: -len(item.ids))
    starts = np.searchsorted(np.cumsum([len(item.ids) for item in items]), np.arange(0, tokens_of(items), budget))
    batches = [items[start:stop] for start, stop in zip(starts, [*starts[1:], len(items)], strict=True) if start < stop]
    largest = LargestPass(max(len(item.ids) for item in items), budget, orders=1)
    found: Figures = {}
    for name in ("none", "nf4"):
        forget_peak(bench.device)
        classifier = scored_model(bench, "gemma-2-9b", quantization=name)
        scorer = ClassifierScorer(classifier, "packed")
        foretold = foretell(scorer, largest)
        forget_peak(bench.device)
        scorer(batches[0])  # kernels are loaded, memory is found
        start = time.perf_counter()
        for batch in batches:
            logits, rescued = scorer(batch)  # numbers, and so waits for the GPU
            require(bool(np.isfinite(logits).all()) and not rescued, "logits are not finite")
        seconds = time.perf_counter() - start
        settings: Any = classifier.backbone.config
        found["bfloat16" if name == "none" else name] = {
            "tokens_per_second": round(tokens_of(items) / seconds),
            "dtype": str(classifier.dtype),
            "attention": ", as ".join(pick_kernel(bench.device, classifier.dtype, settings.head_dim)),
            **memory_figures(foretold, bench.device),
        }
        print(name, found, flush=True)
        del classifier, scorer
        free_memory()
    return found


def foretell(scorer: ClassifierScorer, largest: LargestPass) -> float | str:
    """Bytes at the peak of a prediction, or why they are not foretold: a worker goes on without them, too."""
    try:
        return footprint(scorer, largest).peak
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def memory_figures(foretold: float | str, device: torch.device) -> Figures:
    taken = peak_memory(device)
    if isinstance(foretold, str):
        return {"not_foretold": foretold, "taken_gb": round(taken / 1e9, 3)}
    return {
        "foretold_gb": round(foretold / 1e9, 3),
        "taken_gb": round(taken / 1e9, 3),
        "foretold_over_taken": round(foretold / taken, 3),
    }


class Timed(NamedTuple):
    """An arm of the training: seconds of the timed steps, the first step's loss, and figures."""

    seconds: float
    first_loss: float
    figures: Figures


def qlora_config(bench: Bench, *, checkpointing: bool) -> Config:
    changes = [
        f"model.base={bench.base('gemma-2-9b')}",
        "model.head_bias=false",
        "model.dtype=bfloat16",  # in miniature, too: both libraries then take the ways that they take on a GPU
        "model.lora.lora_dropout=0",
        "train.global_batch_size=4",
        "train.warmup_ratio=0",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
    ]
    return load_config(shipped("configs/lmsys/gemma2-9b-qlora.yaml"), changes)


def labelled(bench: Bench, rows: int) -> tuple[list[Row], list[tuple[Encoded, ...]]]:
    """Rows with labels, the longest four first, so that memory is found in the first step."""
    encoded = bench.encoded(rows)
    longest = sorted(range(rows), key=lambda row: -len(encoded[row][0].ids))[:4]
    encoded = [encoded[row] for row in [*longest, *(row for row in range(rows) if row not in longest)]]
    labels = np.random.default_rng(1).integers(0, CLASSES, rows).tolist()
    fields = dict.fromkeys(LMSYS.fields, ("",))
    targets = np.eye(CLASSES)[labels].tolist()
    return [Row(f"{number}", fields, tuple(target)) for number, target in enumerate(targets)], encoded


def open_training(bench: Bench, config: Config, rows: int) -> tuple[TrainState, Any]:
    """The training of a config, as `pairclf train` constructs it, and what its fit check foretells."""
    accelerator = make_accelerator(config)
    forget_peak(accelerator.device)  # a model's that was there before, or of the making of the base
    classifier = build(config, accelerator.device)
    take_head(classifier, Path(config.model.base))
    examples = make_examples(*labelled(bench, rows), config)
    forecast = forecast_resources(
        config, classifier, examples.lengths, rows_seen=rows, device=accelerator.device, processes=1
    )
    forget_peak(accelerator.device)
    state = construct(config, examples, classifier, accelerator)
    state.model.train()
    return state, forecast


def take_steps(state: TrainState, steps: Sequence[Sequence[int]], first: int = 1) -> list[float]:
    """Optimizer steps over these rows; returns their losses."""
    budget, losses = state.config.train.tokens_per_batch, []
    for number, rows in enumerate(steps, start=first):
        result, budget = accumulate_with_oom_retry(state, np.array(rows), number, budget)
        optimizer_step(state, state.config.train.max_grad_norm, result.loss)
        losses.append(result.loss)
    synchronize(state.accelerator.device)
    return losses


def train_ours(bench: Bench, steps: Sequence[Sequence[int]], *, checkpointing: bool) -> Timed:
    """The first step warms up, and is not timed."""
    state, forecast = open_training(bench, qlora_config(bench, checkpointing=checkpointing), sum(map(len, steps)))
    first = take_steps(state, steps[:1])
    start = time.perf_counter()
    take_steps(state, steps[1:], first=2)
    seconds = time.perf_counter() - start
    return Timed(seconds, first[0], memory_figures(forecast.memory_bytes, bench.device))


def peft_model(config: Config, device: torch.device) -> Any:
    """transformers' classifier of the config's base in NF4, with PEFT's adapters of the config."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16
    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model.base, num_labels=CLASSES, dtype=dtype, quantization_config=nf4, device_map={"": device}
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = config.model.lora
    assert lora is not None
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = LoraConfig(
        task_type="SEQ_CLS", r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=0.0, target_modules=targets
    )
    return get_peft_model(model, adapters)


def train_theirs(bench: Bench, steps: Sequence[Sequence[int]]) -> Timed:
    """HF Trainer with PEFT: the same base in NF4, adapters, head, rows in both orders and steps, padded."""
    from transformers import TrainingArguments

    config = qlora_config(bench, checkpointing=True)
    model, train = peft_model(config, bench.device), config.train
    rows, encoded = labelled(bench, sum(map(len, steps)))
    losses: list[float] = []

    def collate(batch: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        ids = [torch.from_numpy(encoded[row][order].ids).long() for row, order in batch]
        targets = [LMSYS.swap_target(rows[row].target or ()) if order else rows[row].target for row, order in batch]
        inputs = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": inputs, "attention_mask": (inputs > 0).long(), "labels": torch.tensor(targets).argmax(1)}

    def run(steps: Sequence[Sequence[int]]) -> None:
        arguments = TrainingArguments(
            output_dir=str(bench.bases / "trainer"),
            per_device_train_batch_size=2 * len(steps[0]),
            train_sampling_strategy="sequential",  # the order was drawn before
            max_steps=len(steps),
            learning_rate=train.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm or 0.0,
            optim="adamw_torch",
            bf16=True,
            use_cpu=bench.device.type == "cpu",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_strategy="no",
        )
        flat: Any = [(row, order) for step in steps for row in step for order in (0, 1)]
        watched_trainer(losses)(model=model, args=arguments, train_dataset=flat, data_collator=collate).train()
        synchronize(bench.device)

    forget_peak(bench.device)
    run(steps[:1])
    first = losses[0]
    start = time.perf_counter()
    run(steps[1:])
    return Timed(time.perf_counter() - start, first, {"taken_gb": round(peak_memory(bench.device) / 1e9, 3)})


def measure_training(bench: Bench) -> Figures:
    """Useful tokens a second, of both orders; the first losses must be equal, as adapters begin at nothing."""
    count = 3 if bench.miniature else 7
    steps = [[*range(4 * number, 4 * number + 4)] for number in range(count)]
    encoded = labelled(bench, 4 * count)[1]
    tokens = sum(len(one.ids) for step in steps[1:] for row in step for one in encoded[row])
    arms: dict[str, Callable[[], Timed]] = {
        "pairclf": lambda: train_ours(bench, steps, checkpointing=True),
        "trainer": lambda: train_theirs(bench, steps),
    }
    memory = torch.cuda.mem_get_info()[1] if bench.device.type == "cuda" else 0
    if bench.miniature or memory >= ENOUGH_WITHOUT_CHECKPOINTING:
        arms["pairclf_without_checkpointing"] = lambda: train_ours(bench, steps, checkpointing=False)
    found: Figures = {}
    taken: dict[str, Timed] = {}
    for name, arm in arms.items():
        with patch.dict(os.environ):  # Trainer and pairclf each tell Accelerate of another precision
            taken[name] = arm()
        AcceleratorState._reset_state(reset_partial_state=True)
        found[name] = {"tokens_per_second": round(tokens / taken[name].seconds), **taken[name].figures}
        print(name, found[name], flush=True)
        free_memory()
    losses = [timed.first_loss for timed in taken.values()]
    found["first_losses_apart"] = max(losses) - min(losses)
    allowed = 5e-3 if bench.miniature else 5e-2
    require(found["first_losses_apart"] <= allowed, f"the arms do not compute the same: first losses {losses}")
    for name in ("pairclf", "pairclf_without_checkpointing"):
        if name in taken:
            found[f"{name}_over_trainer"] = round(taken["trainer"].seconds / taken[name].seconds, 3)
    return found


def check_float16(bench: Bench) -> Figures:
    """Gemma-2's layers, whose scores are capped; then weights that let activations overflow."""
    items = items_of(bench.encoded(8), orders=2)
    found: Figures = {}
    for name in ("plain", "overflowing"):
        logits = {}
        for dtype in (torch.float32, torch.float16):
            classifier = scored_model(bench, "gemma-2-9b-4-layers", dtype)
            if name == "overflowing":
                mlp: Any = classifier.backbone.layers[0].mlp  # type: ignore[union-attr, index]
                for linear in (mlp.up_proj, mlp.down_proj):
                    linear.weight.data *= 1e4
            logits[dtype], rescued = ClassifierScorer(classifier)(items)
            del classifier
            free_memory()
        require(bool(np.isfinite(logits[torch.float16]).all()), f"{name}: logits in float16 are not finite")
        difference = apart(logits[torch.float16], logits[torch.float32])
        require(difference <= TOLERANCE[torch.float16], f"{name}: float16 is off by {difference:.2g}")
        require(rescued == (len(items) if name == "overflowing" else 0), f"{name}: {rescued} rows were rescued")
        found[name] = {"apart": float(f"{difference:.1e}"), "rescued": rescued}
    return found


def check_memory(bench: Bench) -> Figures:
    """Trainings and predictions of SmolLM2-135M: memory foretold before the first pass, and taken."""
    found: Figures = {}
    budget, rows = (256, 4) if bench.miniature else (8192, 32)
    trainings: dict[str, dict[str, Any]] = {
        "whole, packed": {"lora": None, "quantization": "none"},
        "whole, padded": {"lora": None, "quantization": "none", "layout": "padded"},
        "lora, packed": {"quantization": "none"},
        "nf4 lora, packed, checkpointing": {"gradient_checkpointing": True},
    }
    for name, settings in trainings.items():
        model = {"base": str(bench.base("smollm2-135m")), "head_bias": False}
        model |= {key: settings[key] for key in ("lora", "quantization") if key in settings}
        train = {"tokens_per_batch": budget, "global_batch_size": rows // 2, "per_device_train_batch_size": rows}
        train |= {key: settings[key] for key in ("layout", "gradient_checkpointing") if key in settings}
        state, forecast = open_training(bench, resolve({"model": model, "train": train}), rows)
        take_steps(state, [[*range(rows // 2)], [*range(rows // 2, rows)]])
        found[name] = memory_figures(forecast.memory_bytes, bench.device)
        del state
        free_memory()
    items = items_of(bench.encoded(rows), orders=2)
    for layout in ("padded", "packed", "shared"):
        forget_peak(bench.device)
        scorer = ClassifierScorer(scored_model(bench, "smollm2-135m"), layout)
        longest = max(len(item.ids) for item in items)
        foretold = foretell(scorer, LargestPass(longest, min(2 * budget, tokens_of(items)), orders=2))
        forget_peak(bench.device)
        within = np.cumsum([longest if layout == "padded" else len(item.ids) for item in items]) <= 2 * budget
        scorer(items[: max(1, int(within.sum()))])
        found[f"prediction, {layout}"] = memory_figures(foretold, bench.device)
        del scorer
        free_memory()
    return found


@contextmanager
def scarce_memory(classifier: Classifier, tokens: int, growth: int) -> Iterator[None]:
    """Within, a pass over `tokens` tokens, which takes `growth` bytes, fits, and one over four times as many does not.

    On a GPU nearly all memory is taken. A CPU's is not to be filled: there the backbone says that it ran out.
    """
    if classifier.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(classifier.device)[0]
        taken = torch.empty(max(0, free - 2 * growth), dtype=torch.uint8, device=classifier.device)
        try:
            yield
        finally:
            del taken
            torch.cuda.empty_cache()
        return

    def refuse(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if named["input_ids"].numel() > 2 * tokens:
            raise torch.OutOfMemoryError("more tokens than there is memory for")

    handle = classifier.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_out_of_memory(bench: Bench) -> Figures:
    """A training and a scorer of SmolLM2-135M in float32, with memory for one row of eight."""
    length, rows = (24, 8) if bench.miniature else (1024, 8)
    random = np.random.default_rng(0)
    encoded = [
        tuple(Encoded(random.integers(1, 4096, size, dtype=np.int32), (), {}) for _ in (0, 1))
        for size in [*[length] * rows, 8 * length]
    ]
    model: dict[str, Any] = {"base": str(bench.base("smollm2-135m")), "quantization": "none", "dtype": "float32"}
    model |= {"head_bias": False, "lora": {"lora_dropout": 0.0}}  # its masks would be others in other batches
    train = {"global_batch_size": rows, "per_device_train_batch_size": rows, "tokens_per_batch": None}
    config = resolve({"inputs": {"max_length": 8 * length}, "model": model, "train": train})
    accelerator = make_accelerator(config)
    classifier = build(config, accelerator.device)
    take_head(classifier, bench.base("smollm2-135m"))
    labels = labelled(bench, rows + 1)[0]
    state = construct(config, make_examples(labels, encoded, config), classifier, accelerator)
    state.model.train()

    def gradients() -> Tensor:
        return torch.cat([weight.grad.flatten() for weight in state.weights.values() if weight.grad is not None])

    before = memory_now(bench.device)
    forget_peak(bench.device)
    wanted = accumulate(state, np.arange(rows), 1, 2 * length)  # a row a batch
    assert wanted is not None
    growth, expected = max(1, peak_memory(bench.device) - before), gradients()
    state.optimizer.zero_grad()
    with scarce_memory(classifier, 2 * length, growth):
        result, budget = accumulate_with_oom_retry(state, np.arange(rows), 1, None)
        require(budget is not None, "all rows in one batch did not run out of memory")
        difference = float((gradients() - expected).abs().max() / expected.abs().max())
        require(difference <= 1e-3, f"gradients of the repeated step are off by {difference:.2g}")
        require(abs(result.loss - wanted.loss) <= 1e-4, f"its loss is {result.loss}, not {wanted.loss}")
        state.optimizer.zero_grad()
        message = ""
        try:
            accumulate_with_oom_retry(state, np.array([rows]), 2, None)
        except ModelError as error:
            message = str(error)
        require("out of memory for a single row" in message, f"a row that can't be split: {message or 'no error'}")
    state.optimizer.zero_grad()
    del expected
    return {
        "budget_after": budget,
        "gradients_apart": float(f"{difference:.1e}"),
        "message": message.splitlines()[0],
        **score_in_scarce_memory(bench, classifier.eval(), encoded[:rows]),
    }


def score_in_scarce_memory(bench: Bench, classifier: Classifier, encoded: Sequence[tuple[Encoded, ...]]) -> Figures:
    """A batch that does not fit fails, the device is well after it, and its rows are scored in smaller ones."""
    items, scorer = items_of(encoded, orders=2), ClassifierScorer(classifier, "packed")
    on_device = DeviceScorer(scorer, [bench.device])
    few = [items[start : start + 2] for start in range(0, len(items), 2)]
    forget_peak(bench.device)
    before = memory_now(bench.device)
    wanted = np.concatenate([scorer(two)[0] for two in few])
    growth = max(1, peak_memory(bench.device) - before)
    with scarce_memory(classifier, tokens_of(few[0]), growth):
        failed = False
        try:
            on_device.collect(items, on_device.launch(items))
        except torch.OutOfMemoryError:
            failed = True
        require(failed, "all rows in one batch did not run out of memory")
        require(on_device.recover() is None, "the device is lost after a batch that did not fit")
        values = np.concatenate([on_device.collect(two, on_device.launch(two))[0] for two in few])
    difference = float(np.abs(values - wanted).max())
    require(difference <= 1e-5, f"logits after a failed batch are off by {difference:.2g}")
    return {"logits_apart": float(f"{difference:.1e}")}


def score_in_pool(
    bench: Bench, bundle: Path, encoded: Sequence[tuple[Encoded, ...]], workers: int
) -> tuple[Floats, Figures]:
    """Logits `(rows, 2, C)` by so many workers on the device, and figures; the seconds are those after all loaded."""
    device, size = ("cuda:0" if bench.device.type == "cuda" else "cpu"), 2 if bench.miniature else 16
    longest = max(len(one.ids) for orders in encoded for one in orders)
    model = WorkerModel(
        APPROACH, bundle, None, ("predict.layout=packed",), encoded, LargestPass(longest, 2 * size * longest, orders=2)
    )
    batches = [range(start, min(start + size, len(encoded))) for start in range(0, len(encoded), size)]
    logits, by = np.full((len(encoded), 2, CLASSES), np.nan), set[int]()
    pool = ProcessPool([model], [(device,)] * workers)

    def events(count: int) -> list[Event]:
        found: list[Event] = []
        while len(found) < count:
            found += pool.wait(1.0)
            if lost := [event.what for event in found if isinstance(event, WorkerFailure)]:
                raise PartError(f"{workers} workers: {lost[0]}")
        return found

    try:
        pool.load(0)
        ready = [event.what for event in events(workers) if isinstance(event, WorkerReady)]
        start = time.perf_counter()
        for number, batch in enumerate(batches):
            pool.submit(Job(number, 0, tuple(RowOrders(row, (0, 1)) for row in batch)))
        for event in events(len(batches)):
            assert isinstance(event, BatchScored)
            by.add(event.worker)
            for (row, order), values in zip(event.job.sequences, event.logits, strict=True):
                logits[row, order] = values
        seconds = time.perf_counter() - start
    finally:
        pool.close()
    require(len(by) == workers, f"{len(by)} of {workers} workers scored")
    tokens = sum(len(one.ids) for orders in encoded for one in orders)
    return logits, {"tokens_per_second": round(tokens / seconds), "workers": ready}


def compare_replicas(bench: Bench) -> Figures:
    """One bundle, loaded by one worker, then by two on the same device."""
    base = bench.base("smollm2-135m")
    model = {"base": str(base), "quantization": "none", "lora": {"r": 2}}
    config = resolve({"model": model})
    classifier = build(config, bench.device).eval()
    nn.init.normal_(classifier.head.weight, std=0.5)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(ROOT / "pairclf" / "embedded" / "llama-tiny"))
    encoded = bench.encoded(12 if bench.miniature else 640)
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        bundle.mkdir()
        saved = save_weights(bundle, classifier, config, tokenizer)
        write_bundle(bundle, config, saved, name="gpu", fold=0, metrics={}, prior=[1 / 3] * 3, probes=[])
        del classifier
        free_memory()
        one, alone = score_in_pool(bench, bundle, encoded, 1)
        two, both = score_in_pool(bench, bundle, encoded, 2)
    require(bool(np.isfinite(one).all()), "logits are not finite")
    difference = float(np.abs(one - two).max())
    require(difference <= 2e-2, f"two workers' logits differ from one's by {difference:.2g}")
    return {"one": alone, "two": both, "logits_apart": float(f"{difference:.1e}")}


class Part(NamedTuple):
    """A part: what it runs, the seconds after which it is ended, and its goal."""

    run: Callable[[Bench], Figures]
    seconds: float
    goal: str


PARTS: dict[str, Part] = {
    "tests": Part(run_tests, 50, "all pass"),
    "layouts": Part(compare_layouts, 45, "equal logits"),
    "forward": Part(measure_forward, 110, "23,000 tokens a second in bfloat16"),
    "training": Part(measure_training, 140, "7,000 tokens a second"),
    "float16": Part(check_float16, 30, "finite, as in float32"),
    "memory": Part(check_memory, 35, "foretold within 10%"),
    "out_of_memory": Part(check_out_of_memory, 30, "the same step in smaller batches"),
    "replicas": Part(compare_replicas, 40, "equal logits"),
}


def run_part(name: str, bench: Bench) -> Figures:
    """The figures of a part, run in this process."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    bench.bases.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    with patch.dict(KERNELS, torch_varlen=torch_varlen) if name == "layouts" else nullcontext():
        return {"device": device, "torch": torch.__version__, **PARTS[name].run(bench)}


def main(
    arguments: Sequence[str] | None = None, *, clock: Callable[[], float] = time.monotonic, run: Run | None = None
) -> int:
    """Returns the exit code: 1 if a part failed, or was left for the next call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--minutes", type=float, default=8, help="for all parts; what would begin later is left")
    parser.add_argument("--miniature", action="store_true", help="tiny shapes, which run on a CPU too")
    parser.add_argument("--out", type=Path, help="folder of results.jsonl; runs/gpu, or runs/gpu-miniature")
    parser.add_argument("--bases", type=Path, help="folder of the models, 20 GB; in --out")
    parser.add_argument("--here", choices=PARTS, help="run this part in this process, and print its figures alone")
    options = parser.parse_args(arguments)
    if not (options.miniature or torch.cuda.is_available()):
        parser.error("there is no CUDA device: give --miniature")
    out: Path = options.out or Path("runs/gpu-miniature" if options.miniature else "runs/gpu")
    bench = Bench((options.bases or out / "bases").absolute(), options.miniature)
    if options.here:
        print(json.dumps(run_part(options.here, bench)))
        return 0
    given = [*(["--miniature"] if options.miniature else []), "--out", str(out), "--bases", str(bench.bases)]
    limits = {name: 600 if options.miniature else PARTS[name].seconds for name in options.parts}
    steps = [Step(name, [sys.executable, __file__, "--here", name, *given], limits[name]) for name in limits]
    found = run_steps(steps, out / "results.jsonl", seconds=60 * options.minutes, clock=clock, run=run)
    for name in options.parts:
        print(f"{name:14s} goal: {PARTS[name].goal}: {found[name].get('error', 'done')}")
    print(json.dumps(found))
    return int(any("error" in figures for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
