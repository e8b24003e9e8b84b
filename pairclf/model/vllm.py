"""Score with vLLM in place of transformers: its pooling runner gives the last token's state, and our head the logits.

It serves bundles without adapters.

vLLM's documentation promises no gain over transformers for models that generate nothing. No speed has been measured
here, and no real vLLM has run this: there was no machine for it. So nothing is taken on trust: before it scores a row
the model must give the bundle's probe rows their logits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pairclf.bundles.bundle import Bundle
from pairclf.bundles.inputs import builder_of
from pairclf.bundles.manifest import TOLERANCE
from pairclf.errors import BundleError, ModelError
from pairclf.inputs.plan import PLAIN
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import name_of, pick_dtype, read_settings
from pairclf.model.families import family_of
from pairclf.model.readout import READOUTS
from pairclf.model.scoring import items_of
from pairclf.scores.metrics import Floats
from pairclf.trust import granted

OLDEST, SOFT_CAP = (7, 0), (8, 0)
"""Compute capabilities: the oldest that vLLM runs on, and the oldest whose usual kernels cap scores softly."""


def why_not(bundle: Bundle, devices: Sequence[torch.device]) -> str | None:
    """Why vLLM can't serve the bundle on these devices; None: it can, as far as is known before it is tried."""
    model = bundle.config.model
    if len(devices) > 1:
        return "layers over several devices are not handed to it; set predict.parallelism=replicas"
    if bundle.manifest.weights != "whole":
        return "the bundle holds an adapter; `pairclf export --to bfloat16` (or float16, gptq, awq) makes whole weights"
    if model.pooling not in (None, "last"):
        return f"model.pooling={model.pooling} reads every token, and it gives the last one's state"
    if find_spec("vllm") is None:
        return "the package vllm is not installed: pip install vllm"
    if devices[0].type != "cuda":
        return f"it needs a CUDA device, and this is {devices[0]}"
    capability = torch.cuda.get_device_capability(devices[0])
    version = ".".join(map(str, capability))
    if capability < OLDEST:
        return f"it needs compute capability 7.0, this GPU has {version}"
    if model.dtype == "bfloat16" and capability < (8, 0):
        return f"model.dtype=bfloat16 needs compute capability 8.0, this GPU has {version}"
    settings = read_settings(bundle.files.backbone)
    if why := family_of(settings).refuses.get("vllm"):
        return why
    capped = getattr(settings.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and capability < SOFT_CAP and find_spec("flashinfer") is None:
        return f"the model caps its scores softly; at compute capability {version}: pip install flashinfer-python"
    return None


class VllmScorer:
    """Computes logits of sequences as `scoring.ClassifierScorer` does; vLLM forms its own batches.

    Args:
        bundle: without adapter, with the run's overrides in its config.
        devices: one GPU.

    Attributes:
        layout: packed; that is how vLLM lays sequences, whatever `predict.layout` says.
        why: the same, for people.

    Raises:
        ModelError: vLLM can't serve it.
        BundleError: a probe row's logits are not the bundle's.
    """

    layout = PLAIN
    why = "vLLM's own batches"

    def __init__(self, bundle: Bundle, devices: Sequence[torch.device]) -> None:
        if why := why_not(bundle, devices):
            raise ModelError(f"predict.backend=vllm: {why}", remedy="mend that, or set predict.backend=transformers")
        model, dtype = bundle.config.model, pick_dtype(bundle.config.model.dtype, devices[0])[0]
        _show_only(devices[0])
        vllm = import_module("vllm")
        self._llm = vllm.LLM(
            model=str(bundle.files.backbone),
            tokenizer=str(bundle.files.tokenizer),
            runner="pooling",
            convert="embed",
            dtype=name_of(dtype),
            max_model_len=bundle.config.inputs.max_length,
            trust_remote_code=granted().remote_code,
            seed=bundle.config.seed,
        )
        # The state as it is, not divided by its norm: vLLM 0.11 to 0.14 call it normalize, later ones use_activation.
        fields = vllm.PoolingParams.__struct_fields__
        self._raw = vllm.PoolingParams(**{"normalize" if "normalize" in fields else "use_activation": False})
        weights = load_file(bundle.files.head)
        size = next(weight.shape[1] for weight in weights.values() if weight.ndim == 2)
        settings = read_settings(bundle.files.backbone)
        self._head = READOUTS[model.readout].make(bundle.config, size, settings, lambda: builder_of(bundle))
        if self._head.branches > 1:
            raise ModelError(
                f"predict.backend=vllm: a row has {self._head.branches} branches, and it takes whole sequences",
                remedy="set predict.backend=transformers",
            )
        self._head.load_state_dict(weights, strict=True)
        self._prove(bundle, name_of(dtype))

    @torch.inference_mode()
    def launch(self, items: Sequence[Item]) -> Tensor:
        """States `(R, H)` of the last tokens, float32; vLLM's call returns when they are there."""
        prompts = [{"prompt_token_ids": item.ids.tolist()} for item in items]
        outputs = self._llm.embed(prompts, pooling_params=self._raw, use_tqdm=False)
        return torch.tensor([output.outputs.embedding for output in outputs], dtype=torch.float32)

    @torch.inference_mode()
    def collect(self, items: Sequence[Item], launched: Tensor) -> tuple[Floats, int]:
        """Logits `(R, C)`, and 0: nothing can be computed again in float32; a row that is not finite is NaN."""
        logits: Floats = self._head(launched).double().numpy()
        logits[~np.isfinite(logits).all(axis=1)] = np.nan
        return logits, 0

    def __call__(self, items: Sequence[Item]) -> tuple[Floats, int]:
        """Logits `(R, C)` of the items, in their order, and how many of them were rescued: none."""
        return self.collect(items, self.launch(items))

    def _prove(self, bundle: Bundle, dtype: str) -> None:
        probes = bundle.manifest.probes
        items = items_of(builder_of(bundle).encode([probe.row() for probe in probes]), orders=2)
        logits, _ = self(items)
        saved = np.array([probes[item.row].logits[item.order] for item in items])
        difference = float(np.abs(saved - logits).max())
        allowed = max(TOLERANCE[dtype], TOLERANCE[bundle.manifest.dtype])
        if not difference <= allowed:
            raise BundleError(
                f"vLLM scores the probe rows differently: a logit is off by {difference:.2g} of {allowed:g} allowed",
                where=bundle.folder,
                remedy="set predict.backend=transformers",
            )


def _show_only(device: torch.device) -> None:
    """Let vLLM's own process, which takes the first GPU that it sees, see this one alone."""
    index = device.index or 0
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
