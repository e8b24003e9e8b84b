"""Operations of a model per token and per pair of tokens, counted from its modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from pairclf.bundles.base import resolve_base
from pairclf.bundles.bundle import Bundle
from pairclf.config import Config, Model
from pairclf.model.backbone import LINEAR, empty_model, layer_number, read_settings, weight_files
from pairclf.model.families import Family, family_of, idle_modules, text_settings


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations of a forward pass over a sequence of `T` tokens: `linear * T + quadratic * T**2`.

    Attributes:
        linear: two for each weight of a linear layer, adapters included.
        quadratic: attention's, the half under the causal mask.
        trained: the part of `linear` whose weights are trained.
        reached: the part of the layers, from 0 to 1, that a backward pass goes through: it ends at the first trained
            weight, so that layers below the first adapter need none.
        layers: of the model.
    """

    linear: float
    quadratic: float
    trained: float
    reached: float
    layers: int

    def of(self, lengths: ArrayLike) -> float:
        """Operations of a forward pass over sequences of these lengths."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return float(self.linear * tokens.sum() + self.quadratic * (tokens**2).sum())


def cost_of(config: Config) -> Cost:
    """The cost of the base model, all of it trained, from its config alone: no weights are read."""
    return cost_of_model(empty_model(read_settings(resolve_base(config.model.base), config.model.pooling)))


def cost_of_model(backbone: nn.Module) -> Cost:
    """The cost of a backbone as it stands, quantised or not, with adapters or without.

    A weight of a linear layer takes two operations a token. Attention takes, in each layer, four operations for each
    pair of positions, head and dimension of a head (keys that several heads share save memory, not operations); under a
    causal mask half of the pairs count. DeBERTa compares each token with keys of relative positions too. Sliding
    windows, norms, activations and the head are left out; so is what computes one token of a row alone, a decoder
    behind an encoder.
    """
    text = text_settings(backbone.config)  # type: ignore[arg-type]
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    pairs = 0.5 if family_of(backbone.config).causal else 1.0  # type: ignore[arg-type]
    linears = linear_layers(backbone)
    trained = [name for name, layer in backbone.named_parameters() if layer.requires_grad]
    first = min((max(0, layer_number(name)) for name in trained), default=layers)
    return Cost(
        linear=2.0 * sum(map(count_weights, linears)) + 2.0 * layers * width * _relative_keys(text),
        quadratic=4.0 * pairs * layers * width,
        trained=2.0 * sum(count_weights(layer) for layer in linears if layer.weight.requires_grad),
        reached=1 - first / layers,
        layers=layers,
    )


def _relative_keys(text: Any) -> int:
    """Keys of relative positions that a token is compared with in a layer of DeBERTa; 0 in other models."""
    if not getattr(text, "relative_attention", False):
        return 0
    span = getattr(text, "position_buckets", -1)
    span = span if span > 0 else text.max_relative_positions
    span = span if span > 0 else text.max_position_embeddings
    return 2 * span * len(text.pos_att_type)


def linear_layers(backbone: nn.Module) -> list[Any]:
    """The linear modules of a backbone that compute every token of a row, GPT-2's `Conv1D` among them."""
    family = family_of(backbone.config)  # type: ignore[arg-type]
    linear = [(name, module) for name, module in backbone.named_modules() if isinstance(module, LINEAR)]
    idle = idle_modules(backbone)
    return [module for name, module in linear if module not in idle and not family.once_a_row(name)]


def count_weights(linear: nn.Linear | Conv1D) -> int:
    """The number of weights of a linear module, quantised or not, without its bias."""
    if isinstance(linear, Conv1D):
        return linear.weight.numel()
    return linear.in_features * linear.out_features  # a quantised weight is packed: numel() would be half of it


_STORED = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}
"""Bytes a quantised weight. NF4: half a byte, a scale of one byte a block of 64, and 4 bytes for 256 of these."""


_CAST = {"F64", "F32", "BF16", "F16"}
"""safetensors' names of what is cast to the dtype computed in; all else, packed weights, stays as it is."""


_WIDTHS = {"I64": 8, "I32": 4, "I16": 2}
"""Bytes of what is not cast, where it is not one."""


def model_bytes(bundle: Bundle, base: Path | None = None) -> int:
    """Bytes of a bundle's weights on a GPU, from its files' headers; nothing is loaded.

    Raises:
        ModelError: the base is not there.
    """
    adapter = sum(path.stat().st_size for path in bundle.files.adapter.glob("*.safetensors"))
    source, config = bundle.weights_source(base), bundle.config
    family = family_of(read_settings(source, config.model.pooling))
    reads_lm_head = config.rationale > 0 or config.model.label_scoring == "joint"
    files = weight_files(source)
    return sum(_file_bytes(path, config.model, family, reads_lm_head=reads_lm_head) for path in files) + adapter


def _file_bytes(path: Path, model: Model, family: Family, *, reads_lm_head: bool) -> int:
    """Bytes of the backbone's weights in a file, and of the LM head if it is loaded."""
    width = 4 if model.dtype == "float32" else 2  # auto: a 16-bit dtype on every GPU
    total = 0.0
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dict
            is_lm_head = "lm_head." in name
            if any(prefix in name for prefix in family.unread) and not (is_lm_head and reads_lm_head):
                continue
            tensor = weights.get_slice(name)
            shape, stored = tensor.get_shape(), tensor.get_dtype()
            linear = len(shape) == 2 and "embed" not in name and name.endswith(".weight") and not is_lm_head
            in_float32 = name.split(".")[-2:-1] in ([layer] for layer in family.float32_layers)
            cast = 4 if in_float32 else _STORED.get(model.quantization, width) if linear else width
            total += math.prod(shape) * (cast if stored in _CAST else _WIDTHS.get(stored, 1))
    return math.ceil(total)
