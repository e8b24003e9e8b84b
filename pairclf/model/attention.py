"""The attention that reads a batch's topology: one implementation, named "pairclf", for every family and layout.

It is registered with transformers' two interfaces, so that no architecture is patched: the models hand it their own
scale, soft-cap and sliding window. What a batch says of itself decides what it does:

    attention_mask (B, T)    padded: what the stock implementation would do with that mask
    topology                 packed and shared: the pieces of one row, and where the tokens lie that each sees; nothing
                             of size T x T is made
    cu_seq_lens_q (S+1,)     FlashAttention's word for packed, where no topology is given: sequence s is
                             `cu_seq_lens_q[s]` to `cu_seq_lens_q[s+1]` of one row, and sees itself alone

Nothing is detected. Positions that restart are no sign of packing here, as they are in transformers (where a mask of
ones or a cache switches the detection off without a word, and rows see each other): a layout that packs must say so in
one of these keywords, which transformers passes through; without them a row of a batch is one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from pairclf.errors import ModelError
from pairclf.model.batch import Span, Topology, end_to_end

NAME = "pairclf"
FLASH_HEAD = 256
"""Largest head that FlashAttention 2 has a kernel for."""
QUERIES, QUERIES_ON_CPU = 1024, 64
"""Queries that are computed at once where a mask is needed: keys that none of them sees then cost nothing. Measured on
a CPU, 6 heads of 64, 660 queries that also see 40 keys before: 7.7 ms, 8.1 by 128, all at once 10; the 700 tokens as
one causal sequence 8.4. With soft-capping, 1,500 tokens: 60 ms, 63 by 128, all at once 309."""


class ScoreOptions(NamedTuple):
    """The options of a layer's attention scores.

    Attributes:
        scaling: factor of the scores.
        softcap: the scaled scores become `softcap * tanh(scores / softcap)`; None: they stay as they are.
        window: a query sees itself and the `window - 1` keys before it; None: all keys before it.
        dropout: dropout rate of the weights.
        causal: a query sees no key behind it; otherwise as many as before it.
    """

    scaling: float
    softcap: float | None
    window: int | None
    dropout: float
    causal: bool = True


@dataclass(slots=True)
class AttentionCalls:
    """A record of the calls of the attention function within `recording_calls`.

    Attributes:
        requires_topology: whether every call must bring a topology.
        calls: number of calls.
        masks: each mask that was made, with the function of places that it was made of.
        scores: of each call the module's name, its options, and its mask.
    """

    requires_topology: bool = False
    calls: int = 0
    masks: list[tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=list)
    scores: list[tuple[str, ScoreOptions, Tensor | None]] = field(default_factory=list)

    def record(self, module: nn.Module, topology: Topology | None, mask: Tensor | None, scores: ScoreOptions) -> None:
        """Note one call.

        Raises:
            ModelError: it should have brought a topology, and did not.
        """
        self.calls += 1
        if not self.requires_topology:
            self.scores.append((type(module).__name__, scores, mask))
        elif topology is None:
            raise ModelError(
                f"{type(module).__name__} does not receive the places of the rows in a packed batch: they would see "
                "each other",
                remedy="set train.layout=padded and predict.layout=padded",
            )

    def wrong_window(self) -> str | None:
        """Why the windows handed over are not those of the masks; None: they are. Of a pass over padded rows."""
        functions = {mask_tensor.untyped_storage().data_ptr(): function for mask_tensor, function in self.masks}
        for name, scores, mask in self.scores:
            window = scores.window
            function = None if mask is None else functions.get(mask.untyped_storage().data_ptr())
            if function is not None and _is_of_one_batch(function):
                return f"{name} is given a mask that is made of the tokens of one batch"
            if function is not None and not _has_window(function, scores):
                return f"{name} hands sliding_window={window} to its attention, and its mask is another one"
            if function is None and (mask is not None or window is not None):
                return f"{name} hands its attention another mask than the one that was made for it"
        return None


FAR_POSITION = 1 << 17
"""Length of the row with which masks are probed; a window of this length hides nothing."""


def _has_window(function: Callable[..., Tensor], scores: ScoreOptions) -> bool:
    """Whether a mask's function of (row, head, query, key) lets a far query see the keys of the options' window."""
    query, keys = torch.tensor(FAR_POSITION - 1), torch.arange(2 * FAR_POSITION - 1)
    seen = function(torch.tensor(0), torch.tensor(0), query, keys).broadcast_to(keys.shape)
    near = (query - keys).abs() < (scores.window or FAR_POSITION)
    return torch.equal(seen, near & (keys <= query) if scores.causal else near)


def _is_of_one_batch(function: object) -> bool:
    """Whether a mask's function, or one that it is put together of, holds a tensor. It is not called to know it: with
    places beyond the batch, that would end a GPU's process."""
    if isinstance(function, Tensor):
        return True
    contents = function if isinstance(function, tuple) else [cell.cell_contents for cell in _cells(function)]
    return any(_is_of_one_batch(cell) for cell in contents)


def _cells(function: object) -> tuple[CellType, ...]:
    return getattr(function, "__closure__", None) or ()


_CALLS: ContextVar[AttentionCalls | None] = ContextVar("watch", default=None)


@contextmanager
def recording_calls(watch: AttentionCalls) -> Iterator[None]:
    """Within, and in this thread, `watch` notes every call; activations that backward recomputes are not noted."""
    token = _CALLS.set(watch)
    try:
        yield
    finally:
        _CALLS.reset(token)


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
    topology: Topology | None = None,
    keys_and_values: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `(B, heads, T, D)` -> `(B, T, heads, D)`, and no weights.

    Args:
        module: the model's attention; read for `is_causal`.
        query: `(B, heads, T, D)`; with a topology fewer tokens may ask than are asked.
        key: `(B, key heads, T, D)`; each serves `heads / key heads` heads of the query.
        value: like `key`.
        attention_mask: what `mask` made: `(B, 1, T, T)` bool, True where a query sees a key; None: by the rest.
        dropout: of the weights; the model gives 0 in evaluation.
        scaling: of the scores; None: `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sliding_window: a query sees itself and the `sliding_window - 1` keys before it; and as many behind it, unless
            it is causal.
        is_causal: whether a query sees no key after it; None: as the module says.
        cu_seq_lens_q: `(S + 1,)` int32, where the sequences of a packed row start, and its end; read if there is no
            topology.
        topology: the pieces of a packed row, and what each sees.
        keys_and_values: in place of `key` and `value`, which are then those of the tokens alone that ask (`trim`).

    Raises:
        ModelError: the model asks for more than is known here (attention sinks, position biases).
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if keys_and_values is not None:
        key, value = keys_and_values
    if topology is None and cu_seq_lens_q is not None:
        topology = end_to_end(cu_seq_lens_q.diff().tolist())
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = ScoreOptions(scaling, softcap, sliding_window, dropout, causal)
    if (watch := _CALLS.get()) is not None:
        watch.record(module, topology, attention_mask, scores)
    _refuse_unknown(module, options, attention_mask, topology, causal=causal)
    if torch.is_autocast_enabled(query.device.type):
        # Rotations leave query and key in float32 where weights are, and beside them stands a bfloat16 value.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if topology is None:
        return _rows(query, key, value, scores, attention_mask).transpose(1, 2), None
    kernel, _ = pick_kernel(query.device, query.dtype, query.shape[-1])
    return KERNELS[kernel](query, key, value, scores, topology), None


def mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask as transformers asks for it, once a forward pass and kind of layer.

    Returns:
        `(B, 1, T, T)` bool from a padded batch's `(B, T)` mask; None where there is no mask (packed, or nothing is
        padded): `attend` then needs none.
    """
    if attention_mask is None:
        return None
    made_mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **options)
    if made_mask is not None and (watch := _CALLS.get()) is not None:
        watch.masks.append((made_mask, options.get("mask_function", causal_mask_function)))
    return made_mask


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


class _Varlen(NamedTuple):
    """A topology in FlashAttention's words, on a device.

    Attributes:
        queries: `(P + 1,)` int32, where the pieces' queries start, and their end.
        keys: the same of their keys.
        gather: places of the keys, piece after piece; None: they lie so already.
        longest: most queries, and most keys, of a piece.
    """

    queries: Tensor
    keys: Tensor
    gather: Tensor | None
    longest: tuple[int, int]


@lru_cache(maxsize=8)
def _varlen(topology: Topology, device: torch.device) -> _Varlen:
    """The topology for FlashAttention; cached, so that it is computed once per batch and device, not once per layer."""
    pieces = topology.segments
    asking = torch.tensor([0, *(piece.stop - piece.start for piece in pieces)])
    asked = torch.tensor([0, *(sum(stop - start for start, stop in piece.sees) for piece in pieces)])
    gather = None
    if any(piece.sees != ((piece.start, piece.stop),) for piece in pieces):
        gather = torch.cat([torch.arange(*span) for piece in pieces for span in piece.sees]).to(device)
    queries, keys = (counts.cumsum(0).to(device, torch.int32) for counts in (asking, asked))
    return _Varlen(queries, keys, gather, (int(asking.max()), int(asked.max())))


def _flash(query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions, topology: Topology) -> Tensor:
    """Compute all segments in one call. If there are more keys than queries, FlashAttention aligns their ends."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    lengths = _varlen(topology, query.device)
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (T, heads, D)
    if lengths.gather is not None:
        key, value = key[lengths.gather], value[lengths.gather]
    out: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=lengths.queries,
        cu_seqlens_k=lengths.keys,
        max_seqlen_q=lengths.longest[0],
        max_seqlen_k=lengths.longest[1],
        dropout_p=scores.dropout,
        softmax_scale=scores.scaling,
        causal=scores.causal,
        window_size=_flash_window(scores),
        softcap=scores.softcap or 0.0,
    )
    return out[None]


def _flash_window(scores: ScoreOptions) -> tuple[int, int]:
    """Keys to the left and to the right of a query that it sees, besides itself; -1: all."""
    if scores.window is None:
        return -1, -1
    return scores.window - 1, 0 if scores.causal else scores.window - 1


def _loop(query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions, topology: Topology) -> Tensor:
    """Compute one segment after the other."""
    parts = []
    for start, stop, sees in topology.segments:
        part = _sequence(query[:, :, start:stop], _take(key, sees), _take(value, sees), scores)
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _take(states: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """`(1, heads, T, D)` at the spans; a copy only where there are several."""
    parts = [states[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, ScoreOptions, Topology], Tensor]] = {
    "flash": _flash,
    "loop": _loop,
}
"""The kernels that compute a row of segments, `(1, heads, T, D)` -> `(1, T, heads, D)`; `pick_kernel` chooses one."""


def _rows(query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions, mask: Tensor | None) -> Tensor:
    """Rows of one sequence each, `(B, heads, T, D)` -> the same; a `mask` says all of who sees whom."""
    if mask is None:
        return _sequence(query, key, value, scores)
    return _weigh(query, key, value, scores, mask)


def _sequence(query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions) -> Tensor:
    """The last tokens of a sequence against all of it, `(B, heads, Q, D)`: each sees what is not behind it.

    Where a mask is needed, it goes through a block of queries at a time, so that little is computed in vain.
    """
    if not scores.causal:
        return _both_ways(query, key, value, scores)
    queries, keys = query.shape[2], key.shape[2]
    whole = scores.window is None or scores.window >= keys
    if queries == keys and whole and scores.softcap is None:
        return _weigh(query, key, value, scores, None, causal=True)
    window = keys if scores.window is None or whole else scores.window
    block = QUERIES_ON_CPU if query.device.type == "cpu" else QUERIES
    band = _band(min(block, queries), min(keys, window + block - 1), window, query.device)
    parts = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        end = keys - queries + stop
        first = max(0, end - (stop - start) + 1 - window)
        # Where there is no window all see all but the last keys; scores that are written out are masked there alone.
        diagonal = start - stop if whole and scores.softcap is not None else first - end
        seen = None if stop - start == 1 else band[:, :, start - stop :, diagonal:]
        parts.append(_weigh(query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], scores, seen))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _both_ways(query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions) -> Tensor:
    """All tokens of a sequence against all of it; each sees the window on both of its sides, or all.

    A window of 2, and blocks of 2 queries, `#` = sees. The second block is computed against the keys 1 to 4:

    # # . . .
    # # # . .
    . # # # .
    . . # # #
    """
    length, window = key.shape[2], scores.window
    if window is None or window >= length:
        return _weigh(query, key, value, scores, None)
    reach, block = window - 1, QUERIES_ON_CPU if query.device.type == "cpu" else QUERIES
    ones = torch.ones(block, block + 2 * reach, dtype=torch.bool, device=query.device)
    band = ones.tril(2 * reach).triu()  # of a block that has `reach` keys before it and behind it
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, end = max(0, start - reach), min(length, stop + reach)
        near = band[None, None, : stop - start, first - start + reach : end - start + reach]
        parts.append(_weigh(query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], scores, near))
    return torch.cat(parts, dim=2)


def _weigh(
    query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions, mask: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Values weighed by softmax of the scores where the mask allows, `(B, heads, Q, D)`; None: everywhere."""
    if scores.softcap is not None:
        return _soft_capped(query, key, value, scores, scores.softcap, mask)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu":
        # Repeated and not shared (`enable_gqa`), which a T4's fast kernel can't do.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1), False
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=scores.dropout,
        is_causal=causal,
        scale=scores.scaling,
        enable_gqa=grouped,
    )


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """The mask of a window, `(1, 1, Q, K)` bool, if the last query is the last key. Q = 3, K = 5, window 3, `#` = sees:

    # # # . .
    . # # # .
    . . # # #

    The last Q' rows and K' columns of the mask are the mask of Q' queries and K' keys.
    """
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries).triu(keys - queries + 1 - window)[None, None]


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions, softcap: float, mask: Tensor | None
) -> Tensor:
    """Attention with its scores written out, since SDPA can't cap them; softmax in float32, as the stock models do it.

    A mask that is narrower than the keys speaks of the last of them; those before are seen.
    Heads that share a key are laid below each other, so that neither keys nor values are copied.
    """
    batch, heads, queries, size = query.shape
    shared, keys = key.shape[1:3]
    asking = query.reshape(batch * shared, -1, size)
    raw = torch.baddbmm(
        asking.new_zeros(()),
        asking,
        key.reshape(-1, keys, size).transpose(1, 2),
        beta=0,
        alpha=scores.scaling / softcap,
    )
    capped = (raw.tanh_() * softcap).view(batch, heads, queries, keys)
    if mask is not None:
        # The lowest number and not -inf: a padded place that sees nothing must not become NaN.
        capped[..., -mask.shape[-1] :].masked_fill_(~mask, torch.finfo(capped.dtype).min)
    weights = functional.dropout(capped.softmax(dim=-1, dtype=torch.float32).to(value.dtype), scores.dropout)
    out = torch.bmm(weights.view(batch * shared, -1, keys), value.reshape(-1, keys, size))
    return out.view(batch, heads, queries, size)


def _refuse_unknown(
    module: nn.Module, options: dict[str, Any], mask: Tensor | None, topology: Topology | None, *, causal: bool
) -> None:
    unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    what = f"gives {unknown[0]} to its attention" if unknown else None
    if topology is not None and not causal and any(len(piece.sees) > 1 for piece in topology.segments):
        what = what or "sees both ways where sequences share a beginning"
    if topology is not None and mask is not None:
        what = what or "gives a mask of its own to its attention in a packed batch"
    if what:
        raise ModelError(
            f"{type(module).__name__} {what}, which model.attn_implementation=auto does not know",
            remedy="set model.attn_implementation=eager and train.layout=padded",
        )


def why_not_packed(kind: type | None, settings: Any) -> str | None:
    """Why sequences that lie end to end would mix in a model of this class and config; None: they don't.

    Besides attention that is told its topology by keywords, which is what FlashAttention needs too, nothing may carry
    one token's state to the next: no convolution, no recurrence, no chunks counted from the start of the row.
    """
    kinds = set(getattr(settings.get_text_config(), "layer_types", None) or [])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"has layers of the kind {other[0]}"
    if getattr(kind, "_is_stateful", False):
        return "carries a state from token to token"
    if not reads_topology(kind):
        return "does not pass a batch's topology on to its attention"
    return None


def reads_topology(kind: type | None) -> bool:
    """Whether a class of models hands all it wants of attention to transformers' interface."""
    return bool(getattr(kind, "_supports_flash_attn", False) and getattr(kind, "_supports_attention_backend", False))
