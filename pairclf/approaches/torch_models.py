"""Language models in memory: trained ones as they are saved, those of bundles as workers load them, and their cost."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from pairclf.approaches.protocol import Assignment, Loaded, ModelCost
from pairclf.bundles.bundle import Bundle, Saved
from pairclf.bundles.probes import probe_rows
from pairclf.config import Config
from pairclf.console import console
from pairclf.hardware import LAUNCH_SECONDS, SUSTAINED
from pairclf.inputs.cache import EncodedRows
from pairclf.inputs.plan import DECIDED_ALONE
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.sequences import Item
from pairclf.inputs.tokenise import keeps_line_breaks
from pairclf.model import vllm
from pairclf.model.backbone import name_of, pick_device
from pairclf.model.cost import cost_of, model_bytes
from pairclf.model.device_memory import free_memory
from pairclf.model.engine import Classifier, require_base
from pairclf.model.inputs import encoded_rows, open_inputs
from pairclf.model.positions import require_positions
from pairclf.model.prediction_memory import fitting_budget, footprint
from pairclf.model.scoring import ClassifierScorer, by_order, items_of, keep_freed_memory, score
from pairclf.model.weights import load_classifier, save_weights
from pairclf.run import Run
from pairclf.scores.metrics import Floats

DEQUANTISED = 2.2
"""Bytes moved for each quantised weight in a forward pass: half a byte read, the rest written and read in 16 bits."""


class FittedClassifier:
    """A classifier as it will be saved, in the main process."""

    def __init__(
        self, classifier: Classifier, record: Mapping[str, float], config: Config, tokenizer: Any, encoded: EncodedRows
    ) -> None:
        self._classifier: Classifier | None = classifier
        self.record = record
        self._config = config
        self._tokenizer = tokenizer
        self._encoded = encoded

    @property
    def classifier(self) -> Classifier:
        """The model; it is gone once it was saved, as there is no room for two of them."""
        assert self._classifier is not None
        return self._classifier

    def logits(self, rows: pl.DataFrame) -> Floats:
        items = items_of(self._encoded.of(rows["id"]), orders=2)
        tokens = self._config.predict.tokens_per_batch
        return by_order(items, score(self.classifier, items, tokens_per_batch=tokens, title="score"), len(rows))

    def save(self, folder: Path) -> Saved:
        saved = save_weights(folder, self.classifier, self._config, self._tokenizer)
        self._classifier = None
        free_memory()
        return saved


def open_run(run: Run, *, visible: bool = True) -> tuple[Config, Any, EncodedRows]:
    """A run's config with the chat template written out, the base's tokenizer, and the rows, tokenised for all folds.

    Args:
        run: its config and rows.
        visible: whether to print a note about rows that are longer than the base was made for.
    """
    config, tokenizer, builder, settings = open_inputs(run.config)
    require_base(config, settings)
    limit = require_positions(config, settings)
    if visible and not keeps_line_breaks(tokenizer):
        console.print("note: the tokenizer reads line breaks as blanks, and has no token free for them", style="yellow")
    if limit is not None and visible:
        console.print(f"note: inputs.max_length={config.inputs.max_length}, and {limit}", style="yellow")
    return config, tokenizer, encoded_rows(config, builder, run.frame)


class DeviceScorer:
    """A scorer on devices, which can fail.

    Args:
        scorer: the model's.
        devices: that it computes on.
    """

    def __init__(self, scorer: ClassifierScorer | vllm.VllmScorer, devices: Sequence[torch.device]) -> None:
        self._scorer = scorer
        self._gpus = [device for device in devices if device.type == "cuda"]

    def launch(self, items: Sequence[Item]) -> Tensor:
        return self._scorer.launch(items)

    def collect(self, items: Sequence[Item], launched: Tensor) -> tuple[Floats, int]:
        return self._scorer.collect(items, launched)

    def recover(self) -> str | None:
        gc.collect()
        try:
            for device in self._gpus:
                torch.cuda.synchronize(device)
            if self._gpus:
                torch.cuda.empty_cache()
        except RuntimeError as broken:  # after an assertion or a wild access on a GPU, every call fails
            return f"the GPU is lost to the process: {broken}"
        return None


def load(bundle: Bundle, assignment: Assignment, builder: InputBuilder) -> Loaded:
    """`Approach.load` of a bundle whose inputs the builder makes."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    config, devices = bundle.config, [torch.device(device) for device in assignment.devices]
    if config.predict.backend == "vllm":
        served = vllm.VllmScorer(bundle, devices)
        return Loaded(DeviceScorer(served, devices), served.layout, f"{_name(devices[0])}, {served.why}")
    if devices[0].type == "cuda":  # pinned memory and peft go to the current device, which would else be the first
        torch.cuda.set_device(devices[0])
    classifier = _classifier(bundle, builder, devices[0], assignment.base, devices[1:])
    if devices[0].type == "cpu":
        keep_freed_memory()
    scorer = ClassifierScorer(classifier, config.predict.layout)
    names = " + ".join(_name(device) for device in devices)
    memory, budget = ("", None) if devices[1:] else _memory(scorer, assignment)
    what = f"{names}, {name_of(classifier.dtype)}; {scorer.why}{memory}"
    return Loaded(DeviceScorer(scorer, devices), scorer.layout, what, budget)


def score_probes(bundle: Bundle, builder: InputBuilder, base: Path | None) -> tuple[Floats, str]:
    """`Approach.score_probes` of a bundle whose inputs the builder makes."""
    rows = probe_rows(bundle)
    free_memory()
    classifier, settings = _classifier(bundle, builder, pick_device(), base), bundle.config.predict
    items = items_of(builder.encode(rows), orders=2)
    logits = score(
        classifier, items, tokens_per_batch=settings.tokens_per_batch, layout=settings.layout, title="probes"
    )
    return by_order(items, logits, len(rows)), name_of(classifier.dtype)


def _classifier(
    bundle: Bundle, builder: InputBuilder, device: torch.device, base: Path | None, others: Sequence[torch.device] = ()
) -> Classifier:
    """`load_classifier`, with an embedding for every token of its inputs."""
    classifier = load_classifier(bundle, device, base, others=others)
    embedding: Any = classifier.backbone.get_input_embeddings()  # type: ignore[operator]
    builder.require_embeddings(len(embedding.weight))
    return classifier


def cost(bundle: Bundle, base: Path | None) -> ModelCost:
    """`Approach.cost` of a bundle."""
    model = bundle.config.model.model_copy(update={"base": bundle.weights_source(base)})
    counted = cost_of(bundle.config.model_copy(update={"model": model}))
    size, moved = model_bytes(bundle, base), DEQUANTISED * counted.linear / 2 if model.quantization != "none" else 0.0
    if bundle.config.rationale:
        # What is read before a rationale, and the rationale, are read again with the label word behind it, and once
        # more for each token that is decided alone. A pass over a token a sequence takes as long as it takes to
        # read the weights, or to launch its kernels.
        times, launched = 2 + DECIDED_ALONE * bundle.config.rationale, LAUNCH_SECONDS * counted.layers
        return ModelCost(times * counted.linear, times * counted.quadratic, size, SUSTAINED, max(moved, size), launched)
    return ModelCost(counted.linear, counted.quadratic, size, SUSTAINED, moved)


def _memory(scorer: ClassifierScorer, assignment: Assignment) -> tuple[str, int | None]:
    """What the largest pass will take, for people, and the budget that fits where that one does not."""
    try:
        expected = footprint(scorer, assignment.largest, processes=assignment.beside)
        if expected.fits:
            return f"; memory {expected}", None
        fitting = fitting_budget(scorer, assignment.largest, processes=assignment.beside)
    except Exception as error:  # noqa: BLE001
        # Memory may run out in the short pass that it begins with, and it leans on torch's inner workings, which change
        # from version to version: without a forecast the passes themselves will tell, and a model is not lost.
        return f"; memory is not foretold ({type(error).__name__}: {error})", None
    return f"; memory {expected}: passes of {fitting:,} tokens", fitting


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
