"""The attention that reads a batch's topology: one implementation, named "pairclf", for every decoder and layout.

It is registered with transformers' two interfaces, so that no architecture is patched: the models hand it their own
scale, soft-cap and sliding window. What a batch says of itself decides what it does:

    attention_mask (B, T)      padded: what the stock implementation would do with that mask
    cu_seq_lens_q, ... (S+1,)  packed: sequence s is `cu_seq_lens_q[s]` to `cu_seq_lens_q[s+1]` of one row, and sees
                               itself alone; nothing of size T x T is made

Nothing is detected. Positions that restart are no sign of packing here, as they are in transformers (where a mask of
ones or a cache switches the detection off without a word, and rows see each other): a layout that packs must hand over
`cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, the keywords that transformers passes through to
FlashAttention; without them a row of a batch is one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pairclf.errors import ModelError

NAME = "pairclf"
FLASH_HEAD = 256
"""Largest head that FlashAttention 2 has a kernel for."""


class Scores(NamedTuple):
    """What a layer does with its scores.

    Attributes:
        scaling: they are multiplied by it.
        softcap: then they become `softcap * tanh(scores / softcap)`; None: they stay.
        window: a query sees itself and the `window - 1` keys before it; None: all before it.
        dropout: of the weights.
    """

    scaling: float
    softcap: float | None
    window: int | None
    dropout: float


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `(B, heads, T, D)` -> `(B, T, heads, D)`, and no weights.

    Args:
        module: the model's attention; read for `is_causal`.
        query: `(B, heads, T, D)`.
        key: `(B, key heads, T, D)`; each serves `heads / key heads` heads of the query.
        value: like `key`.
        attention_mask: what `mask` made: `(B, 1, T, T)` bool, True where a query sees a key; None: by the rest.
        dropout: of the weights; the model gives 0 in evaluation.
        scaling: of the scores; None: `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sliding_window: a query sees itself and the `sliding_window - 1` keys before it.
        is_causal: whether a query sees no key after it; None: as the module says.
        cu_seq_lens_q: `(S + 1,)` int32, where the sequences of a packed row start, and its end.
        max_length_q: tokens of the longest of them; None: it is looked up.

    Raises:
        ModelError: the model asks for more than is known here (attention sinks, position biases).
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    _refuse_unknown(module, options, packed=cu_seq_lens_q is not None, causal=causal)
    if torch.is_autocast_enabled(query.device.type):
        # Rotations leave query and key in float32 where weights are, and beside them stands a bfloat16 value.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scaling, softcap, sliding_window if causal else None, dropout)
    if cu_seq_lens_q is None:
        return _alone(query, key, value, scores, attention_mask, causal=causal).transpose(1, 2), None
    kernel, _ = pick_kernel(query.device, query.dtype, query.shape[-1])
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
    return KERNELS[kernel](query, key, value, scores, cu_seq_lens_q, longest), None


def mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask as transformers asks for it, once a forward pass and kind of layer.

    Returns:
        `(B, 1, T, T)` bool from a padded batch's `(B, T)` mask; None where there is no mask (packed, or nothing is
        padded): `attend` then needs none.
    """
    if attention_mask is None:
        return None
    made: Tensor | None = sdpa_mask(attention_mask=attention_mask, **options)
    return made


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


def pick_kernel(device: torch.device, dtype: torch.dtype, head: int) -> tuple[str, str]:
    """The kernel for packed batches, a key of `KERNELS`, and why.

    Args:
        device: where the batch is.
        dtype: what attention computes in.
        head: size of a head.
    """
    if device.type != "cuda":
        return "loop", f"{device.type}: FlashAttention runs on CUDA alone"
    if dtype not in (torch.float16, torch.bfloat16):
        return "loop", f"FlashAttention does not compute in {str(dtype).removeprefix('torch.')}"
    if not _flash_installed():
        return "loop", "the package flash-attn is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "loop", f"FlashAttention needs compute capability 8.0, this GPU has {major}.{minor}"
    if head > FLASH_HEAD:
        return "loop", f"FlashAttention takes heads of at most {FLASH_HEAD}, not {head}"
    return "flash", "flash-attn is installed"


@cache
def _flash_installed() -> bool:
    return find_spec("flash_attn") is not None


def _flash(query: Tensor, key: Tensor, value: Tensor, scores: Scores, starts: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    out: Tensor = flash_attn_varlen_func(
        *(one.transpose(1, 2).flatten(0, 1) for one in (query, key, value)),  # (T, heads, D)
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=scores.dropout,
        softmax_scale=scores.scaling,
        causal=True,
        window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),  # keys to the left, to the right
        softcap=scores.softcap or 0.0,
    )
    return out[None]


def _loop(query: Tensor, key: Tensor, value: Tensor, scores: Scores, starts: Tensor, longest: int) -> Tensor:
    """One sequence after the other. On a GPU the lengths are read back once a layer, which waits for the GPU."""
    lengths: list[int] = starts.diff().tolist()
    queries, keys, values = (torch.split(one, lengths, dim=2) for one in (query, key, value))
    parts = [_alone(q, k, v, scores, None).transpose(1, 2) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(parts, dim=1)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Scores, Tensor, int], Tensor]] = {"flash": _flash, "loop": _loop}
"""What computes a packed row, `(1, heads, T, D)` -> `(1, T, heads, D)`; `pick_kernel` chooses."""


def _alone(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Tensor | None, *, causal: bool = True
) -> Tensor:
    """Rows of one sequence each, `(B, heads, T, D)` -> the same; a `mask` says all of who sees whom."""
    tokens = query.shape[2]
    if mask is None and scores.window is not None and scores.window < tokens:
        mask = _band(tokens, scores.window, query.device)
    if scores.softcap is not None:
        mask = _band(tokens, tokens, query.device) if mask is None and causal else mask
        return _soft_capped(query, key, value, scores, scores.softcap, mask)
    # Keys are repeated and not shared (`enable_gqa`): as fast on CPU, and a T4's fast kernel can't share.
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=scores.dropout,
        is_causal=causal and mask is None,
        scale=scores.scaling,
    )


def _band(tokens: int, window: int, device: torch.device) -> Tensor:
    """Who sees whom in one sequence, `(1, 1, T, T)` bool. T = 5, window 3, `#` = sees:

    # . . . .
    # # . . .
    # # # . .
    . # # # .
    . . # # #
    """
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)[None, None]


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, softcap: float, mask: Tensor | None
) -> Tensor:
    """Attention with its scores written out, since SDPA can't cap them; softmax in float32, as the stock models do it.

    Heads that share a key are laid below each other, so that neither keys nor values are copied.
    """
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    raw = query.reshape(batch, shared, -1, size) @ key.transpose(2, 3) * scores.scaling
    capped = (torch.tanh(raw / softcap) * softcap).view(batch, heads, tokens, tokens)
    if mask is not None:
        # The lowest number and not -inf: a padded place that sees nothing must not become NaN.
        capped = capped.masked_fill(~mask, torch.finfo(capped.dtype).min)
    weights = functional.dropout(capped.softmax(dim=-1, dtype=torch.float32).to(value.dtype), scores.dropout)
    return (weights.view(batch, shared, -1, tokens) @ value).view(batch, heads, tokens, size)


def _refuse_unknown(module: nn.Module, options: dict[str, Any], *, packed: bool, causal: bool) -> None:
    unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if unknown or (packed and not causal):
        what = f"gives {unknown[0]} to its attention" if unknown else "sees both ways in a packed batch"
        raise ModelError(
            f"{type(module).__name__} {what}, which model.attention=auto does not know",
            remedy="set model.attention=eager and train.layout=padded",
        )


def why_not_packed(model: nn.Module) -> str | None:
    """Why sequences that lie end to end would mix in this model; None: they don't.

    Besides attention that is told its topology by keywords, which is what FlashAttention needs too, nothing may carry
    one token's state to the next: no convolution, no recurrence, no chunks counted from the start of the row.
    """
    config: Any = model.config
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"has layers of the kind {other[0]}"
    if getattr(model, "_is_stateful", False):
        return "carries a state from token to token"
    if not reads_topology(model):
        return "does not pass a batch's topology on to its attention"
    return None


def reads_topology(model: nn.Module | type) -> bool:
    """Whether a model, or a class of models, hands all it wants of attention to transformers' interface."""
    return bool(getattr(model, "_supports_flash_attn", False) and getattr(model, "_supports_attention_backend", False))
