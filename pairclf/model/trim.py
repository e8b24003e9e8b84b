"""Trim the last layer: all tokens give keys and values there, and only the read tokens go through the rest of it.

A classifier reads one token per sequence. The queries, output projections and MLP of the other tokens are wasted in the
last layer: about an eighth of a model with 8 layers, 2-3% of one with 42.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from pairclf.model.attention import NAME
from pairclf.model.batch import Topology
from pairclf.model.families import family_of

KeysAndValues = tuple[Tensor, Tensor]
"""`(1, key heads, T, D)` each, of all tokens, rotated by their positions where the model does so."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of all tokens' positions, `(1, T, D)` each."""


def _of_llama(layer: Any, hidden: Tensor, rotation: Rotation) -> KeysAndValues:
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape).transpose(1, 2)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    return _rotated(keys, rotation), attention.v_proj(normed).view(shape).transpose(1, 2)


def _of_bert(layer: Any, hidden: Tensor, rotation: None) -> KeysAndValues:
    attention = layer.attention.self
    shape = (*hidden.shape[:-1], -1, attention.attention_head_size)
    return attention.key(hidden).view(shape).transpose(1, 2), attention.value(hidden).view(shape).transpose(1, 2)


def _of_modernbert(layer: Any, hidden: Tensor, rotation: Rotation) -> KeysAndValues:
    # One matrix makes queries, keys and values: the queries of all tokens are computed in vain.
    three = layer.attn.Wqkv(layer.attn_norm(hidden)).view(*hidden.shape[:-1], 3, -1, layer.attn.head_dim)
    _, keys, values = (states.transpose(1, 2) for states in three.unbind(dim=-3))
    return _rotated(keys.float(), rotation).to(keys.dtype), values


def _rotated(keys: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = (part.unsqueeze(1) for part in rotation)
    rotated: Tensor = keys * cos + rotate_half(keys) * sin  # type: ignore[no-untyped-call]
    return rotated


LAYERS: dict[str, Callable[[Any, Tensor, Any], KeysAndValues]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "eurobert"), _of_llama),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _of_bert),
    "modernbert": _of_modernbert,
}
"""By `model_type`, the keys and values of a layer from the hidden states that it is given; each is proved by a test."""


def why_not_trimmed(backbone: nn.Module) -> str | None:
    """Why the last layer can't be computed at the read places alone; None: it can."""
    config: Any = backbone.config
    if config._attn_implementation != NAME:
        return f"model.attn_implementation={config._attn_implementation} can't be told of it"
    if config.model_type not in LAYERS:
        return f"the layers of {config.model_type} are not known: {', '.join(LAYERS)} are"
    if not family_of(config).causal and (getattr(config, "layer_types", None) or [None])[-1] == "sliding_attention":
        return "its last layer sees a window around each token, whose place in its row is not known any more"
    if len(set(getattr(backbone, "hf_device_map", {}).values())) > 1:
        return "its layers lie over several devices"  # and the inputs of the last one come from another one
    return None


@contextmanager
def reading_at(backbone: nn.Module, read_at: Tensor) -> Iterator[None]:
    """Within, the backbone returns hidden states `(1, R, H)` of the read tokens instead of `(1, T, H)`.

    No module is replaced, so that adapters and quantised weights stay what they are: the last layer is handed the read
    tokens instead of all, and its attention the keys and values of all (`attention.attend`).

    Args:
        backbone: one that `why_not_trimmed` has nothing against, with adapters or without; none that recomputes its
            activations.
        read_at: `(R,)` places in the one row of a batch that has a topology.
    """
    config: Any = backbone.config
    keys_and_values = LAYERS[config.model_type]

    def hand_over(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        topology: Topology = named["topology"]
        device = next(layer.parameters()).device  # the layers before may lie on another
        hidden, at = positional[0].to(device), read_at.to(device)
        changed: dict[str, Any] = {"topology": topology.at_ends()}
        rotation = named.get("position_embeddings")
        if rotation is not None:
            rotation = tuple(part.to(device) for part in rotation)
            changed["position_embeddings"] = tuple(part[:, at] for part in rotation)
        if named.get("position_ids") is not None:
            changed["position_ids"] = named["position_ids"].to(device)[:, at]
        changed["keys_and_values"] = keys_and_values(layer, hidden, rotation)
        return (hidden[:, at], *positional[1:]), {**named, **changed}

    handle = last_layer(backbone).register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def last_layer(backbone: nn.Module) -> nn.Module:
    """The last layer, wherever adapters have put the model."""
    return next(
        module[-1]
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in ("layers", "layer")
    )
