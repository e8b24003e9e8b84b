"""Check that rows in a batch score as each row alone; measured once for every base, before it is used.

What a model's class says of itself (`attention.why_not_packed`) is a claim. A layer that drops its keyword arguments
never hands the topology on, and packed rows then see each other in silence. So the base is run on two short rows of
random ids, each alone with the attention and the positions that transformers brings, and then together, as every
layout lays them; the states of every token must agree. Windows are longer than such rows: what the model asks its mask
to be is compared with the window that it hands to its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pairclf.errors import ModelError
from pairclf.inputs.sequences import MIN_SHARED_TOKENS, Item
from pairclf.model.attention import NAME, AttentionCalls, recording_calls, why_not_packed
from pairclf.model.batch import Batch, Topology
from pairclf.model.families import REMEDY, family_of, states_settings
from pairclf.model.layouts import Isolation, packed, padded, shared
from pairclf.model.positions import first_position, moved
from pairclf.model.precision import in_float32
from pairclf.model.trim import reading_at, why_not_trimmed

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a token's hidden states, as a part of the spread of all tokens' states; by what is computed in.

Rows that see each other differ by 0.1 to 2 at the first token of the second row, rounding of 48 layers by 1e-5, 1e-2
and 5e-2. Nearly all is compared in float32, whatever the weights are stored in."""


_RESULTS: dict[tuple[object, ...], Isolation] = {}


def isolation_of(backbone: nn.Module, dtype: torch.dtype) -> Isolation:
    """The isolation of a base, measured at the first call in a process and cached.

    Args:
        backbone: the base as it was loaded, without adapters, quantised or not, on one device or several.
        dtype: what it computes in.

    Raises:
        ModelError: the base can't be run, or a row of a padded batch does not score as the row alone.
    """
    config: Any = backbone.config
    weight = next(backbone.parameters())
    settings = (config.name_or_path, config.to_json_string(use_diff=False), config._attn_implementation)
    places = frozenset(map(str, getattr(backbone, "hf_device_map", {}).values()))
    key = (type(backbone), settings, dtype, weight.dtype, weight.device, places)
    if key not in _RESULTS:
        _RESULTS[key] = probe(backbone, dtype)
    return _RESULTS[key]


def probe(backbone: nn.Module, dtype: torch.dtype) -> Isolation:
    """`isolation_of`, measured: five or six forward passes over at most 40 tokens.

    Nothing of the model, of torch's random numbers or of its mode is another one afterwards.

    Raises:
        ModelError: as `isolation_of`.
    """
    # FlashAttention computes in 16 bits alone.
    precise = [] if _implementation(backbone) == "flash_attention_2" else [torch.float32]
    ways = [*precise, *([dtype] if dtype not in precise else [])]
    with _undisturbed(backbone):
        for way in ways:
            try:
                with in_float32(backbone) if way == torch.float32 else _autocast(backbone, way):
                    return _compare_layouts(backbone, way)
            except ModelError:
                raise
            except Exception as error:
                # In float32: a module that reaches for another one's 16-bit weights, or no room for a copy of them.
                if way == ways[-1]:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise _cannot_run(backbone, error) from error
    raise AssertionError("unreachable")


def _autocast(backbone: nn.Module, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(_device(backbone).type, dtype, enabled=dtype != torch.float32)


def _cannot_run(backbone: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"{_named(backbone)} can't be run on token ids: {type(error).__name__}: {str(error)[:300]}", remedy=REMEDY
    )


def _compare_layouts(backbone: nn.Module, dtype: torch.dtype) -> Isolation:
    rows, allowed, calls = _test_rows(backbone), TOLERANCE[dtype], AttentionCalls()
    with _stock_attention(backbone):
        alone = [_run(backbone, _by_its_own_positions(padded([row])))[0] for row in rows]
    size, width = getattr(states_settings(backbone.config), "hidden_size", None), alone[0].shape[-1]
    if size is not None and width != size:  # Reformer joins two states
        raise ModelError(
            f"{_named(backbone)} gives hidden states of {width} numbers, and its config says {size}", remedy=REMEDY
        )
    spread = _spread(alone)
    with recording_calls(calls):
        states = _run(backbone, padded(rows))
    difference = max(
        _difference(states[row, : len(states_alone)], states_alone, spread) for row, states_alone in enumerate(alone)
    )
    if not difference <= allowed:
        raise ModelError(
            f"{_named(backbone)}: hidden states of a row in a padded batch differ from those of the row alone, by "
            f"{difference:.2g} of their spread",
            remedy="use another base; no layout of a batch is right for this one",
        )

    def differs(batch: Batch, *, trim: bool) -> str | None:
        return _differs(backbone, batch, alone, spread, allowed, calls.calls, trim=trim)

    why_packed = claimed(backbone) or calls.wrong_window() or differs(packed(rows), trim=False)
    if why_packed or _implementation(backbone) != NAME:
        unknown = f"model.attn_implementation={_implementation(backbone)} knows no tokens that several sequences see"
        return Isolation(why_packed, why_packed or unknown, why_not_trimmed(backbone) or why_packed, calls.calls)
    refused = family_of(backbone.config).refuses.get("shared")  # type: ignore[arg-type]
    why_trimmed = why_not_trimmed(backbone) or differs((packed if refused else shared)(rows), trim=True)
    # Where the last layer is right at the read places, so is all before it.
    why_shared = differs(shared(rows), trim=False) if why_trimmed and not refused else refused
    return Isolation(None, why_shared, why_trimmed, calls.calls)


def claimed(backbone: nn.Module) -> str | None:
    """Why packed rows would see each other, according to the class and its attention implementation."""
    if why := why_not_packed(type(backbone), backbone.config):
        return f"{type(backbone).__name__} {why}"
    if _implementation(backbone) not in (NAME, "flash_attention_2"):
        return f"model.attn_implementation={_implementation(backbone)} would let packed rows see each other"
    return None


def _differs(
    backbone: nn.Module,
    batch: Batch,
    alone: Sequence[Tensor],
    spread: Tensor,
    allowed: float,
    attentions: int,
    *,
    trim: bool,
) -> str | None:
    """Why rows in a batch get other hidden states than alone; None: they don't."""
    topology, calls = batch.inputs["topology"], AttentionCalls(requires_topology=True)
    assert isinstance(topology, Topology)
    keywords = {
        name: rows_alone
        for name, rows_alone in batch.inputs.items()
        if name != "topology" or _implementation(backbone) == NAME
    }
    read_at = batch.read_at.to(_device(backbone))
    try:
        with recording_calls(calls), reading_at(backbone, read_at) if trim else nullcontext():
            states = _run(backbone, replace(batch, inputs=keywords))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
        return f"{type(backbone).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)
    if calls.calls != attentions:
        return f"{type(backbone).__name__} calls its attention {attentions} times in a padded batch, {calls.calls} here"
    places = [[row] for row in range(len(alone))] if trim else [_places(path) for path in topology.paths]
    expected = [rows_alone[-1:] for rows_alone in alone] if trim else list(alone)
    apart = max(_difference(states[at], rows_alone, spread) for at, rows_alone in zip(places, expected, strict=True))
    if not apart <= allowed:
        return (
            f"{type(backbone).__name__}: hidden states of a row beside others differ from those of the row alone, by "
            f"{apart:.2g} of their spread"
        )
    return None


def _places(path: Sequence[tuple[int, int]]) -> list[int]:
    return [place for span in path for place in range(*span)]


def _test_rows(backbone: nn.Module) -> list[Item]:
    """Two rows of random ids of the vocabulary, none of them special, that begin alike and end in other lengths."""
    config: Any = backbone.config.get_text_config()  # type: ignore[union-attr, operator]
    settings = {**config.to_dict(), **backbone.config.to_dict()}  # type: ignore[union-attr, operator]
    special = {
        token_id
        for name, token_id in settings.items()
        if name.endswith(("_id", "_index")) and isinstance(token_id, int)
    }
    ids = np.setdiff1d(np.arange(min(config.vocab_size, 1 << 16)), list(special)).astype(np.int32)
    random = np.random.default_rng(0)
    start, ends = random.choice(ids, MIN_SHARED_TOKENS), random.permutation(ids)[:8]
    return [Item(0, 0, np.concatenate([start, ends[:3]])), Item(1, 0, np.concatenate([start, ends[3:]]))]


def _run(backbone: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states in float32, `(B, T, H)`."""
    inputs = moved(batch.to(_device(backbone)).inputs, first_position(backbone))
    return family_of(backbone.config).states(backbone, inputs).float()  # type: ignore[arg-type]


def _by_its_own_positions(batch: Batch) -> Batch:
    """Without positions: the model counts them itself."""
    inputs = {name: given for name, given in batch.inputs.items() if name != "position_ids"}
    return replace(batch, inputs=inputs)


def _spread(alone: Sequence[Tensor]) -> Tensor:
    """How far tokens lie from their mean in each dimension, `(H,)`: some dimensions are huge and say nothing."""
    states = torch.cat(list(alone))
    spread = (states - states.mean(0)).abs().mean(0)
    return spread.clamp(min=float(states.abs().mean()) * 1e-6 + torch.finfo(torch.float32).tiny)


def _difference(states: Tensor, alone: Tensor, spread: Tensor) -> float:
    """The largest difference of a token's `(T, H)` states: a mean over dimensions, each by its spread."""
    return float(((states - alone).abs() / spread).mean(-1).max())


@contextmanager
def _undisturbed(backbone: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; mode, random numbers and a GPU's free memory are afterwards as before."""
    training = backbone.training
    # Those alone that hold weights: another GPU would be given a context of this process, and lose memory to it.
    devices = sorted({weight.device.index for weight in backbone.parameters() if weight.is_cuda})
    backbone.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        backbone.train(training)
        if devices:
            torch.cuda.empty_cache()


@contextmanager
def _stock_attention(backbone: nn.Module) -> Iterator[None]:
    """Within, layers compute attention as their own file has it, where otherwise ours is called."""
    configs = {
        id(config): config for module in backbone.modules() if (config := getattr(module, "config", None)) is not None
    }
    ours = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == NAME]
    for config in ours:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config in ours:
            config._attn_implementation = NAME


def _implementation(backbone: nn.Module) -> str:
    config: Any = backbone.config
    return str(config._attn_implementation)


def _device(backbone: nn.Module) -> torch.device:
    return next(backbone.parameters()).device


def _named(backbone: nn.Module) -> str:
    config: Any = backbone.config
    return f"{type(backbone).__name__} of {config.name_or_path or 'this base'}"
