"""Rationales: a base's own greedy continuation of a text, which stands before the label that is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig

from pairclf.errors import ModelError
from pairclf.inputs.plan import by_token_budget
from pairclf.inputs.render import RATIONALE
from pairclf.inputs.sequences import Item
from pairclf.model.batch import BackboneInputs, Batch, Span, Topology
from pairclf.model.families import family_of
from pairclf.model.isolation import TOLERANCE
from pairclf.model.layouts import Isolation, MakeBatch
from pairclf.model.lm_head import LmHead, afterwards

MAX_CACHED = 2
"""Tokens whose keys and values are kept at once, padding included, in multiples of those that a pass computes: what
sequences begin with is computed once and kept for each, and short ones are padded."""

Read = Callable[[BackboneInputs, DynamicCache | None], Tensor]
"""Hidden states `(B, T, H)` of a batch's inputs; a cache is read and extended."""


class RationaleWriter(NamedTuple):
    """Writes the rationales of a batch's sequences together; none depends on what is written beside it.

    All are read in one pass, as the batch lies; then each pass gives every sequence one more token, and those that have
    ended leave. A pass over several sequences rounds otherwise than one over each. So where the two likeliest tokens
    are nearer to each other than rounding may move them, a pass over this sequence alone decides, without a cache:
    whatever stands beside it, its tokens are the same.

    Attributes:
        lm_head: the base's, on the device and in the dtype computed in.
        finish: what the base does to its scores.
        stop: tokens that end a turn.
        together: whether several sequences are written at once; a base that can't pack may carry more from token to
            token than keys and values.
    """

    lm_head: LmHead
    finish: Callable[[Tensor], Tensor]
    stop: frozenset[int]
    together: bool

    def completed(self, read: Read, items: Sequence[Item], lay_out: MakeBatch) -> list[Item]:
        """The items with a rationale in place of their marks, as long as they are many; without marks, as they are.

        Args:
            read: runs the base.
            items: those of one forward pass.
            lay_out: how they lie in it.
        """
        marks = [np.flatnonzero(item.ids == RATIONALE) for item in items]
        marked = [number for number, places in enumerate(marks) if len(places)]
        texts = [items[number]._replace(ids=items[number].ids[: marks[number][0]]) for number in marked]
        if not texts:
            return list(items)
        most = len(marks[marked[0]])
        groups = [[number] for number in range(len(texts))]
        if self.together:
            tokens = lay_out(texts).inputs["input_ids"]
            assert isinstance(tokens, Tensor)
            cached = MAX_CACHED * (tokens.numel() + most * len(texts))
            groups = by_token_budget([len(text.ids) + most for text in texts], cached)
        completed = list(items)
        for group in groups:
            written = self._greedy(read, [texts[number] for number in group], most, lay_out)
            for number, ids in zip(group, written, strict=True):
                item, places = items[marked[number]], marks[marked[number]]
                parts = [item.ids[: places[0]], np.array(ids, dtype=np.int32), item.ids[places[-1] + 1 :]]
                completed[marked[number]] = item._replace(ids=np.concatenate(parts))
        return completed

    @torch.inference_mode()
    def _greedy(self, read: Read, texts: Sequence[Item], most: int, lay_out: MakeBatch) -> list[list[int]]:
        """At most so many tokens for each, each the likeliest behind those before it, up to one that ends the turn."""
        device, cache = self.lm_head.weight.device, DynamicCache()
        batch = lay_out(texts).to(device)
        states = read(batch.inputs, cache).flatten(0, 1)[batch.read_at.to(device)]
        lengths = batch.lengths.to(device)
        attended = lengths.new_ones(1, int(lengths[0])) if len(texts) == 1 else _pad_on_the_left(cache, batch, device)
        written: list[list[int]] = [[] for _ in texts]
        active = list(range(len(texts)))
        for step in range(most):
            tokens, unsure = self._likeliest(states)
            for place in unsure:
                ids = np.concatenate([texts[active[place]].ids, np.array(written[active[place]], dtype=np.int32)])
                alone = lay_out([Item(0, 0, ids)]).to(device)
                (tokens[place],), _ = self._likeliest(read(alone.inputs, None)[0, -1:])
            going = [place for place, token in enumerate(tokens) if token not in self.stop]
            for place in going:
                written[active[place]].append(tokens[place])
            if step + 1 == most or not going:
                break
            if len(going) < len(active):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                attended, lengths, active = attended[kept], lengths[kept], [active[place] for place in going]
            attended = functional.pad(attended, (0, 1), value=1)
            last = torch.tensor([[tokens[place]] for place in going], device=device)
            inputs: BackboneInputs = {
                "input_ids": last,
                "attention_mask": attended,
                "position_ids": lengths[:, None] + step,
            }
            states = read(inputs, cache)[:, -1]
        return written

    def _likeliest(self, states: Tensor) -> tuple[list[int], list[int]]:
        """The likeliest token behind each state of `(R, H)`; and the places where rounding may have chosen it."""
        weight, bias = self.lm_head.weight, self.lm_head.bias
        scores = self.finish(functional.linear(states.to(weight), weight, bias).float())
        spread = (scores - scores.mean(dim=1, keepdim=True)).abs().mean(dim=1)
        (first, second), tokens = (top.T for top in scores.topk(2))
        unsure = first - second <= TOLERANCE[weight.dtype] * spread
        return tokens[0].tolist(), unsure.nonzero().flatten().tolist()


def _pad_on_the_left(cache: DynamicCache, batch: Batch, device: torch.device) -> Tensor:
    """Give each sequence of a batch a row of the cache, which ends at its last token: windows count places.

    Two sequences `a a b` and `a a c c`, of which the batch has the common start once, `a a b c c`:

        . a a b        0 1 1 1
        a a c c        1 1 1 1

    Returns:
        What is no padding, `(B, L)` int64.
    """
    topology, lengths = batch.inputs.get("topology"), batch.lengths.tolist()
    paths: Sequence[Sequence[Span]] = [
        ((at + 1 - n, at + 1),) for at, n in zip(batch.read_at.tolist(), lengths, strict=True)
    ]
    if isinstance(topology, Topology):
        paths = topology.paths
    attended = torch.zeros(len(paths), max(lengths), dtype=torch.long)
    places = torch.zeros_like(attended)
    for row, path in enumerate(paths):
        own = torch.cat([torch.arange(*span) for span in path])
        places[row, -len(own) :], attended[row, -len(own) :] = own, 1
    for layer in filled_layers(cache):
        at = places.to(layer.keys.device)
        layer.keys = layer.keys.transpose(1, 2).flatten(0, 1)[at].transpose(1, 2)
        layer.values = layer.values.transpose(1, 2).flatten(0, 1)[at].transpose(1, 2)
    return attended.to(device)


def filled_layers(cache: DynamicCache) -> list[Any]:
    """The layers of a cache that hold `keys` and `values` `(B, key heads, T, D)`; some models share them."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def writer_of(
    source: str, backbone: nn.Module, lm_head: LmHead, dtype: torch.dtype, isolation: Isolation
) -> RationaleWriter:
    """The writer of a base.

    Args:
        source: folder or hub id of the base, whose `generation_config.json` says what ends a turn.
        backbone: the base without its LM head.
        lm_head: that head.
        dtype: what is computed in.
        isolation: of the base.

    Raises:
        ModelError: the base is no decoder.
    """
    config: Any = backbone.config
    if not family_of(config).causal:
        raise ModelError(
            f"prompt.rationale needs a base that continues a text, and {source} is a {config.model_type}",
            remedy="set prompt.rationale=0, or use a decoder",
        )
    embedding: Any = backbone.get_input_embeddings()  # type: ignore[operator]
    lm_head = lm_head.on(embedding.weight.device)
    bias = None if lm_head.bias is None else lm_head.bias.to(dtype)
    lm_head = lm_head._replace(weight=lm_head.weight.to(dtype), bias=bias)
    return RationaleWriter(lm_head, afterwards(config), _stop_tokens(source, config), isolation.packed is None)


def _stop_tokens(source: str, config: Any) -> frozenset[int]:
    """Those of `generation_config.json`, or of `config.json` if there is no such file."""
    try:
        settings: Any = GenerationConfig.from_pretrained(source)
    except OSError:  # one that is there and can't be read was refused when the base was loaded
        settings = config.get_text_config()
    ends = settings.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
