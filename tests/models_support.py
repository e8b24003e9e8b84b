"""Models and sequences that tests of several rooms share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pairclf.config import Config
from pairclf.inputs.sequences import Item
from pairclf.model.batch import Batch, Segment, Span, Topology
from pairclf.model.engine import Classifier, build
from pairclf.model.layouts import padded


def as_built(config: Config) -> Classifier:
    """The same weights for the same config, all of which have a say in the logits, which are of order one."""
    made = build(config, torch.device("cpu")).eval()
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or name == "head.weight":
            torch.nn.init.normal_(parameter, std=0.2 if name == "head.weight" else 0.02)
    return made


def related_items() -> list[Item]:
    """Rows in both orders that begin with one instruction, prompts and answers shorter and longer than a window of 32;
    then a row in one order, a sequence twice, one that another begins with, one token, and a stranger."""
    random = np.random.default_rng(0)

    def text(tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(0, 260, tokens, dtype=np.int32)

    instruction, made = text(20), []
    for row, (prompt, answers) in enumerate([(1, 30), (40, 50), (5, 9), (70, 3), (0, 1)]):
        begin = np.concatenate([instruction, text(prompt)])
        made += [Item(row, order, np.concatenate([begin, text(answers + order)])) for order in (0, 1)]
    alone = np.concatenate([instruction, text(30)])
    others = [alone, made[2].ids, made[2].ids[:60], made[2].ids[:1], text(25)]
    return made + [Item(5 + number, 0, ids) for number, ids in enumerate(others)]


def logits_of(classifier: Classifier, batch: Batch, *, trim: bool = False) -> torch.Tensor:
    with torch.inference_mode():
        return classifier(batch.inputs, batch.read_at, batch.lengths, trim=trim)


def one_at_a_time(classifier: Classifier, items: Sequence[Item]) -> torch.Tensor:
    """Logits `(R, C)`, each of a forward pass of its own, the last layer whole."""
    return torch.cat([logits_of(classifier, padded([item])) for item in items])


def topology_of(batch: Batch) -> Topology:
    topology = batch.inputs["topology"]
    assert isinstance(topology, Topology)
    return topology


def with_topology(change: Callable[[tuple[Span, ...]], tuple[Span, ...]]) -> Callable[[Batch], Batch]:
    """Spoil what pieces and sequences see."""

    def spoil(batch: Batch) -> Batch:
        topology = topology_of(batch)
        pieces = tuple(Segment(one.start, one.stop, change(one.sees)) for one in topology.segments)
        wrong = Topology(pieces, tuple(change(path) for path in topology.paths))
        return replace(batch, inputs={**batch.inputs, "topology": wrong})

    return spoil


forget_what_went_before = with_topology(lambda sees: sees[-1:])
see_the_siblings = with_topology(lambda sees: ((0, sees[-1][1]),))


def with_lm_head(base: Path, folder: Path, *, tied: bool, shard: str = "1GB", **settings: object) -> Path:
    """The base again, saved with its LM head and with other settings in its config; the tokenizer comes along."""
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=tied, **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
