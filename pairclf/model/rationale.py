"""Rationales: a base's own greedy continuation of a text, which stands before the label that is scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig

from pairclf.errors import ModelError
from pairclf.inputs.render import RATIONALE
from pairclf.inputs.truncate import Ids
from pairclf.model.families import family_of
from pairclf.model.lm_head import LmHead, afterwards


class RationaleWriter(NamedTuple):
    """Writes rationales, one sequence at a time: no other row has a say in what is written, not even by rounding.

    Attributes:
        lm_head: the base's, on the device and in the dtype computed in.
        finish: what the base does to its scores.
        stop: tokens that end a turn.
    """

    lm_head: LmHead
    finish: Callable[[Tensor], Tensor]
    stop: frozenset[int]

    def completed(self, backbone: nn.Module, ids: Ids) -> Ids:
        """A sequence with a rationale in place of its marks, as long as they are many; without marks, as it is."""
        marks = np.flatnonzero(ids == RATIONALE)
        if not len(marks):
            return ids
        start, stop = int(marks[0]), int(marks[-1]) + 1
        return np.concatenate([ids[:start], self._greedy(backbone, ids[:start], stop - start), ids[stop:]])

    @torch.inference_mode()
    def _greedy(self, backbone: nn.Module, ids: Ids, most: int) -> Ids:
        """At most so many tokens, each the likeliest behind those before it, up to one that ends the turn."""
        device, cache, written = self.lm_head.weight.device, DynamicCache(), list[int]()
        tokens = torch.from_numpy(ids).long()[None].to(device)
        while len(written) < most:
            states: Tensor = backbone(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
            scores = functional.linear(states[0, -1].to(self.lm_head.weight), self.lm_head.weight, self.lm_head.bias)
            token = int(self.finish(scores.float()).argmax())
            if token in self.stop:
                break
            written.append(token)
            tokens = torch.tensor([[token]], device=device)
        return np.array(written, dtype=np.int32)


def writer_of(source: str, backbone: nn.Module, lm_head: LmHead, dtype: torch.dtype) -> RationaleWriter:
    """The writer of a base.

    Args:
        source: folder or hub id of the base, whose `generation_config.json` says what ends a turn.
        backbone: the base without its LM head.
        lm_head: that head.
        dtype: what is computed in.

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
    return RationaleWriter(lm_head, afterwards(config), _stop_tokens(source, config))


def _stop_tokens(source: str, config: Any) -> frozenset[int]:
    """Those of `generation_config.json`, or of `config.json` if there is no such file."""
    try:
        settings: Any = GenerationConfig.from_pretrained(source)
    except OSError:  # one that is there and can't be read was refused when the base was loaded
        settings = config.get_text_config()
    ends = settings.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
