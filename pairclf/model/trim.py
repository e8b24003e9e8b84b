"""Trim the last layer: all tokens give keys and values there, and only the read tokens go through the rest of it.

A classifier reads one token per sequence. The queries, output projections and MLP of the other tokens are wasted in the
last layer: about an eighth of a model with 8 layers, 2-3% of one with 42.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from pairclf.model.attention import NAME
from pairclf.model.batch import Topology

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the decoders whose layer is as `_keys_and_values` says; each is proved by a test."""


def why_not_trimmed(backbone: nn.Module) -> str | None:
    """Why the last layer can't be computed at the read places alone; None: it can."""
    config: Any = backbone.config
    if config._attn_implementation != NAME:
        return f"model.attn_implementation={config._attn_implementation} can't be told of it"
    if config.model_type not in FAMILIES:
        return f"the layers of {config.model_type} are not known: {', '.join(FAMILIES)} are"
    if len(set(getattr(backbone, "hf_device_map", {}).values())) > 1:
        return "its layers lie over several devices"  # and the inputs of the last one come from another one
    return None


@contextmanager
def reading_at(backbone: nn.Module, read_at: Tensor) -> Iterator[None]:
    """Within, the backbone returns hidden states `(1, R, H)` of the read tokens instead of `(1, T, H)`.

    No module is replaced, so that adapters and quantised weights stay what they are: the last layer is handed the read
    tokens instead of all, and all keys and values come to its attention as if they stood in a cache.

    Args:
        backbone: one that `why_not_trimmed` has nothing against, with adapters or without, in evaluation.
        read_at: `(R,)` places in the one row of a batch that has a topology.
    """

    def hand_over(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        topology: Topology = named["topology"]
        device = next(layer.parameters()).device  # the layers before may lie on another
        hidden, cos, sin, positions, at = (
            tensor.to(device)
            for tensor in (positional[0], *named["position_embeddings"], named["position_ids"], read_at)
        )
        changed = {
            "position_embeddings": (cos[:, at], sin[:, at]),
            "position_ids": positions[:, at],
            "past_key_values": _keys_and_values(layer, hidden, cos, sin),
            "topology": topology.at_ends(),
        }
        return (hidden[:, at], *positional[1:]), {**named, **changed}

    handle = last_layer(backbone).register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def last_layer(backbone: nn.Module) -> nn.Module:
    """The last decoder layer, wherever adapters have put the model."""
    return next(
        module[-1]
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "layers"
    )


@dataclass(frozen=True)
class _KeysAndValues:
    """A substitute for a cache: keys and values `(1, key heads, T, D)` of all tokens; it ignores the layer's own."""

    keys: Tensor
    values: Tensor

    def update(self, key: Tensor, value: Tensor, *where: object) -> tuple[Tensor, Tensor]:
        """transformers' call: the layer's new keys and values in, all there are out."""
        return self.keys, self.values


def _keys_and_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> _KeysAndValues:
    """The layer's keys and values of `(1, T, H)` hidden states; cos and sin are `(1, T, D)`."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape).transpose(1, 2)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = keys * cos.unsqueeze(1) + rotate_half(keys) * sin.unsqueeze(1)  # type: ignore[no-untyped-call]
    return _KeysAndValues(keys, attention.v_proj(normed).view(shape).transpose(1, 2))
