"""Language models in bundles: what the approaches that score with one have in common.

A process that prepares rows and plans needs no torch, which takes seconds to import: what does (`torch_models.py`) is
imported where a model is loaded, trained or counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

from pairclf.approaches.protocol import Assignment, Loaded, ModelCost, Prepared
from pairclf.bundles.bundle import Bundle
from pairclf.bundles.inputs import builder_of
from pairclf.console import Advance, progress
from pairclf.hardware import dtype_of
from pairclf.inputs.cache import EncodedRows, RowSource, token_cache
from pairclf.inputs.render import Encoded, InputBuilder
from pairclf.inputs.sequences import SequenceIndex, index_sequences
from pairclf.scores.metrics import Floats
from pairclf.task import Row


class LanguageModelApproach:
    """What approaches have in common whose models are a base, a head, and perhaps adapters: all but the training."""

    module = "pairclf.approaches.torch_models"
    uses_gpu = True
    unit = "tokens"

    def __init__(self) -> None:
        self._builders: dict[tuple[Path, bool], InputBuilder] = {}

    def recipe(self, bundle: Bundle) -> str:
        config, files = bundle.config, bundle.manifest.files
        parts = (config.inputs, config.data.of_bundle, config.prompt)
        read = [part.model_dump(mode="json", exclude={"num_proc"}) for part in parts]
        examples = files.get(bundle.files.examples.name)
        tokenizer = self._builder(bundle).tokenizer.fingerprint
        branches = [config.model.one_sided, config.model.scored_words]
        return json.dumps(["language model", tokenizer, *read, branches, examples])

    def encode(self, bundle: Bundle, rows: Sequence[Row]) -> Sequence[tuple[Encoded, ...]]:
        return self._builder(bundle).encode(rows)

    def prepare(self, bundle: Bundle, source: RowSource, folder: Path) -> Prepared:
        builder, config = self._builder(bundle), bundle.config
        fields, processes = config.task.fields, config.inputs.num_proc
        encoded = EncodedRows(token_cache(folder, source, builder.tokenizer, fields, processes=processes), builder)
        with progress("lengths", total=len(encoded)) as advance:
            return Prepared(encoded, index_sequences(_watched(encoded, advance, source.step())))

    def _builder(self, bundle: Bundle) -> InputBuilder:
        """Made once: a tokenizer takes a while to load."""
        key = bundle.folder, bundle.config.is_pointwise
        if key not in self._builders:
            self._builders[key] = builder_of(bundle)
        return self._builders[key]

    def longest(self, bundle: Bundle) -> int:
        return bundle.config.inputs.max_length

    def index(self, encoded: Sequence[tuple[Encoded, ...]]) -> SequenceIndex:
        return index_sequences(encoded)

    def cost(self, bundle: Bundle, base: Path | None) -> ModelCost:
        from pairclf.approaches import torch_models

        return torch_models.cost(bundle, base)

    def identity(self, bundle: Bundle, devices: Sequence[str]) -> dict[str, object]:
        model, predict = bundle.config.model, bundle.config.predict
        return {
            "torch": version("torch"),
            "transformers": version("transformers"),
            "dtype": sorted({_dtype(model.dtype, device) for device in devices}),
            "attention": model.attn_implementation,
            "layout": predict.layout,
            "backend": predict.backend,
        }

    def load(self, bundle: Bundle, assignment: Assignment) -> Loaded:
        from pairclf.approaches import torch_models

        return torch_models.load(bundle, assignment, self._builder(bundle))

    def score_probes(self, bundle: Bundle, base: Path | None) -> tuple[Floats, str]:
        from pairclf.approaches import torch_models

        return torch_models.score_probes(bundle, self._builder(bundle), base)


def _dtype(setting: str, device: str) -> str:
    """The name of the dtype that is computed in on a device."""
    capability = None
    if setting == "auto" and device.startswith("cuda"):
        import torch

        capability = torch.cuda.get_device_capability(device)
    return dtype_of(setting, capability)[0]


def _watched(encoded: EncodedRows, advance: Advance, is_over: Callable[[], bool]) -> Iterator[tuple[Encoded, ...]]:
    for row in takewhile(lambda row: not is_over(), encoded):
        yield row
        advance()
