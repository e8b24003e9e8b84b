"""Readout: hidden states -> one state a sequence `(R, H)` -> logits `(R, C)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pairclf.config import Config
from pairclf.errors import ModelError, quoted
from pairclf.inputs.builder import trie_of
from pairclf.inputs.labels import LabelTrie
from pairclf.inputs.render import InputBuilder
from pairclf.model.lm_head import LmHead, afterwards
from pairclf.task import Task


class LinearHead(nn.Linear):
    """A linear head on a sequence's state, in float32 whatever the backbone computes in.

    It is ours and stands outside the backbone: nothing quantises it, drops it on merging, or loads it at random, and
    it needs no `ForSequenceClassification` class to exist for the architecture.

    Attributes:
        branches: states that it reads for one row of logits, as every head says.
    """

    branches = 1

    def __init__(self, hidden_size: int, classes: int, *, bias: bool = True) -> None:
        super().__init__(hidden_size, classes, bias=bias, dtype=torch.float32)
        _start_small(self)

    def forward(self, state: Tensor) -> Tensor:
        """`(R, H)` of any dtype -> `(R, C)` float32."""
        return super().forward(state.float())

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Start from `(C, H)` rows of an LM head: the first logits are the LM's own for these words, bias zero.

        They are the LM's raw logits: where it caps or scales them afterwards (`final_logit_softcapping`,
        `logits_scaling`), nothing does so here. The order of the classes is the same under a cap, the distances are
        larger.
        """
        self.weight.copy_(rows)


class TwoLayerHead(nn.Module):
    """Linear H -> H, GELU, Linear H -> C, all in float32; see `LinearHead`."""

    branches = 1

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.outer = nn.Linear(hidden_size, classes, dtype=torch.float32)
        self.out_features = classes
        _start_small(self.outer)

    def forward(self, state: Tensor) -> Tensor:
        """`(R, H)` of any dtype -> `(R, C)` float32."""
        logits: Tensor = self.outer(functional.gelu(self.inner(state.float())))
        return logits


def _start_small(last: nn.Linear) -> None:
    """The first logits are near zero and the first loss is near log C."""
    nn.init.normal_(last.weight, std=0.02)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


HEADS: dict[str, type[LinearHead] | type[TwoLayerHead]] = {"linear": LinearHead, "two_layer": TwoLayerHead}


class LabelTokenHead(nn.Module):
    """The LM head's rows of the labels' tokens, in float32 and frozen, with all that the model does to its logits.

    A label of several tokens is as likely as all of them in sequence, one of several words as any of them.

    Args:
        hidden_size: H.
        classes: C.
        finish: the model's cap and scale (`lm_head.afterwards`).
        trie: the labels' tokens, E edges that leave K inner nodes.
        by_label: the trie's labels are yes and no, which are read behind the text of each class by itself: its logit is
            that of yes, `log p(yes) - log p(no)`.

    Attributes:
        branches: K; C * K by label.
        measures_mass: the logits of a row are not those, but the logarithm of how likely some label is; by label, of
            how likely some answer is behind each.
        answers_apart: in training, and by label, the logits are `(R, C, 2)`, those of yes and no.
        prior: `(C,)`, log-probabilities that are taken off the labels' logits (`prompt.calibration`).
        vocabulary: the whole LM head: a logit is then the label's log-probability over the vocabulary. None: a token is
            as likely as it is among the labels' tokens at its place; if there is one place, a logit is the LM's own.
            There, both have the same softmax over the labels.
    """

    def __init__(
        self,
        hidden_size: int,
        classes: int,
        finish: Callable[[Tensor], Tensor],
        trie: LabelTrie,
        *,
        by_label: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(trie.edges), hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(len(trie.edges)), requires_grad=False)
        self.prior = nn.Parameter(torch.zeros(classes), requires_grad=False)
        self.out_features = classes
        self.branches = len(trie.nodes) * (classes if by_label else 1)
        self.measures_mass = False
        self.answers_apart = False
        self.vocabulary: LmHead | None = None
        self._finish = finish
        self._trie = trie
        self._by_label = by_label

    def forward(self, state: Tensor) -> Tensor:
        """`(branches * R, H)` of any dtype, a row's in sequence -> `(R, C)` float32; its mass `(R, 1)` or `(R, C)`."""
        logits = self._of_words(state)
        classes = self.out_features if self._by_label else 1
        if self.measures_mass:
            return logits.logsumexp(dim=1).view(-1, classes)
        if self._by_label:
            if self.training and self.answers_apart:
                return logits.view(-1, classes, 2)
            yes, no = logits.unbind(dim=1)
            logits = (yes - no).view(-1, classes)
        return logits - self.prior

    def _of_words(self, state: Tensor) -> Tensor:
        """`(K * P, H)`, the inner nodes at P places -> `(P, labels of the trie)` float32."""
        nodes = [node for node, _ in self._trie.edges]
        at_nodes = state.float().view(-1, len(self._trie.nodes), state.shape[-1])
        edges = self._finish(torch.einsum("reh,eh->re", at_nodes[:, nodes], self.weight) + self.bias)
        if self.vocabulary is not None:
            edges = edges - self.vocabulary.log_total(state, self._finish).view(len(at_nodes), -1)[:, nodes]
        elif len(self._trie.nodes) > 1:
            siblings = torch.tensor([[node == other for node in nodes] for other in nodes], device=state.device)
            edges = edges - edges[:, None].masked_fill(~siblings, -torch.inf).logsumexp(dim=-1)
        words = [(label, edges[:, list(way)].sum(dim=1)) for label, way in self._trie.words]
        labels = sorted({label for label, _ in words})
        synonyms = [[logits for other, logits in words if other == label] for label in labels]
        return torch.stack([torch.stack(logits).logsumexp(dim=0) for logits in synonyms], dim=1)

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Take the tokens' rows `(E, H)` and biases `(E,)`."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)


TieModel = Callable[[Tensor, Tensor], Tensor]


class RewardHead(nn.Module):
    """A reward for each of a row's two sides, and logits of what comes of two rewards; all in float32.

    The logits of the two sides' victories sum to the sum of their rewards. For a pointwise task the rewards themselves
    are the logits.

    Args:
        hidden_size: H.
        task: which class is whose victory, the third is a tie; or a pointwise one (`Task.pointwise`).
        ties: `rewards (R, 2), tie () -> (R, 3)`, logits of A, B and a tie, a value of `TIE_MODELS`.

    Attributes:
        branches: 2 sides, or 1 text.
        tie: how likely equal rewards tie; at 0, all three classes are equally likely then.
    """

    def __init__(self, hidden_size: int, task: Task, ties: TieModel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        self.tie = nn.Parameter(torch.zeros(()), requires_grad=len(task.classes) > 2)
        self.out_features = len(task.classes)
        self.branches = 2 if task.swappable else 1
        nn.init.normal_(self.weight, std=0.02)
        sides = [task.classes.index(name) for name in task.swap_classes or ()]
        ties_at = [column for column in range(len(task.classes)) if column not in sides]
        self._columns = [[*sides, *ties_at].index(column) for column in range(len(task.classes))]
        self._ties = ties

    def forward(self, state: Tensor) -> Tensor:
        """`(2 * R, H)` of any dtype, a row's two sides in sequence -> `(R, C)` float32; `(R, H)` -> `(R, 1)`."""
        rewards = functional.linear(state.float(), self.weight).view(-1, self.branches)
        return rewards if self.branches == 1 else self.logits_of(rewards)

    def logits_of(self, rewards: Tensor) -> Tensor:
        """`(R, 2)` rewards of both sides -> `(R, C)`."""
        return self._ties(rewards, self.tie)[:, self._columns]


def _bradley_terry(rewards: Tensor, tie: Tensor) -> Tensor:
    """P(A) = e^a / (e^a + e^b)."""
    return rewards


def _davidson(rewards: Tensor, tie: Tensor) -> Tensor:
    """P(A) : P(B) : P(tie) = e^a : e^b : nu e^((a + b) / 2), with nu = e^tie."""
    return torch.cat([rewards, rewards.mean(dim=1, keepdim=True) + tie], dim=1)


def _rao_kupper(rewards: Tensor, tie: Tensor) -> Tensor:
    """P(A) = e^a / (e^a + theta e^b), P(B) = e^b / (e^b + theta e^a), the rest a tie; theta = 1 + e^tie.

    Their logarithms, all moved by the same, so that those of A and B sum to a + b.
    """
    log_theta = functional.softplus(tie)
    a, b = rewards.unbind(dim=1)
    of_a, of_b = torch.logaddexp(a, log_theta + b), torch.logaddexp(b, log_theta + a)  # the denominators
    log_ties = tie + torch.log(2 + tie.exp())  # log(theta^2 - 1)
    half = (of_b - of_a) / 2
    return torch.stack([a + half, b - half, a + b - (of_a + of_b) / 2 + log_ties], dim=1)


TIE_MODELS: dict[str, TieModel] = {"bradley_terry": _bradley_terry, "davidson": _davidson, "rao_kupper": _rao_kupper}
"""`model.tie_model`, and what there is without ties."""


def _reward_head(config: Config, hidden_size: int, settings: Any, builder: Callable[[], InputBuilder]) -> RewardHead:
    task = config.task
    ties = config.model.tie_model or ("davidson" if len(task.classes) > 2 else "bradley_terry")
    return RewardHead(hidden_size, task, TIE_MODELS[ties])


Head = LinearHead | TwoLayerHead | LabelTokenHead | RewardHead


@contextmanager
def over_vocabulary(head: LabelTokenHead, lm_head: LmHead, *, mass: bool = False) -> Iterator[None]:
    """Within, a label's logit is its log-probability over the whole vocabulary; or the head measures their mass.

    In training, and by label, yes and no have such a logit each: their difference would not tell how likely both are.
    """
    before, head.vocabulary = head.vocabulary, lm_head.on(head.weight.device)
    head.measures_mass, head.answers_apart = mass, not mass
    try:
        yield
    finally:
        head.vocabulary, head.measures_mass, head.answers_apart = before, False, False


# --- the readouts ----------------------------------------------------------------------------------------------------


class BaseParts(NamedTuple):
    """What a head may start from, opened where it is asked for.

    Attributes:
        builder: the recipe, with the base's tokenizer.
        lm_head: the base's LM head; the argument is the setting that needs it.
    """

    builder: Callable[[], InputBuilder]
    lm_head: Callable[[str], LmHead]


class Readout(NamedTuple):
    """A way from states to logits: a value of `model.readout`.

    Attributes:
        make: an empty head, of the config, H, the backbone's settings and the recipe.
        start: fills a head before the training.
        attach: gives it what is in the base and in no bundle.
    """

    make: Callable[[Config, int, Any, Callable[[], InputBuilder]], Head]
    start: Callable[[Any, Config, BaseParts], None] = lambda head, config, base: None
    attach: Callable[[Any, Config, BaseParts], None] = lambda head, config, base: None


def _start_from_words(head: LinearHead | TwoLayerHead, config: Config, base: BaseParts) -> None:
    words = config.model.label_words
    if words and isinstance(head, LinearHead):  # the config allows no other head
        builder = base.builder()
        ids = [_one_token(builder, words[name][0]) for name in config.task.classes]
        head.start_from(_rows(base, "model.label_words", ids)[0])


def _one_token(builder: InputBuilder, word: str) -> int:
    ids = builder.tokenizer([word], special=True, start=True)[0]
    if len(ids) != 1:
        raise ModelError(
            f"model.label_words: {quoted(word)} is {len(ids)} tokens of the base's tokenizer; it must be one",
            remedy="give a word that is one token; a leading blank often decides it, e.g. ' A' in place of 'A'",
        )
    return int(ids[0])


def _rows(base: BaseParts, setting: str, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The LM head's rows of tokens of `model.label_words`."""
    lm_head = base.lm_head(setting)
    if unknown := [token for token in tokens if token >= lm_head.size]:
        (name,) = base.builder().tokenizer.names(np.array(unknown[:1], dtype=np.int32))
        raise ModelError(
            f"model.label_words: {name} is a token that the base has no embedding for",
            remedy="give a word of the tokenizer that the base model was published with",
        )
    return lm_head.rows(tokens)


def _start_from_tokens(head: LabelTokenHead, config: Config, base: BaseParts) -> None:
    tokens = [token for _, token in trie_of(config, base.builder()).edges]
    head.start_from(*_rows(base, "model.readout=label_tokens", tokens))


def _attach_vocabulary(head: LabelTokenHead, config: Config, base: BaseParts) -> None:
    if config.model.label_scoring == "joint" and head.branches > 1:
        head.vocabulary = base.lm_head("model.label_scoring=joint").on(head.weight.device)


def _label_token_head(
    config: Config, hidden_size: int, settings: Any, builder: Callable[[], InputBuilder]
) -> LabelTokenHead:
    trie, classes = trie_of(config, builder()), len(config.task.classes)
    return LabelTokenHead(hidden_size, classes, afterwards(settings), trie, by_label=config.by_label)


def _head(config: Config, size: int) -> LinearHead | TwoLayerHead:
    classes = len(config.task.classes)
    return HEADS[config.model.head](size, classes) if config.model.head_bias else LinearHead(size, classes, bias=False)


READOUTS: dict[str, Readout] = {
    "head": Readout(make=lambda config, size, settings, builder: _head(config, size), start=_start_from_words),
    "label_tokens": Readout(_label_token_head, _start_from_tokens, _attach_vocabulary),
    "reward": Readout(make=_reward_head),
}
"""By `model.readout`. A new one is a record here and a name in `config.model`."""


def mean(hidden: Tensor, read_at: Tensor, lengths: Tensor) -> Tensor:
    """`(B, T, H)` hidden states -> `(R, H)` float32: the mean over each sequence's tokens, however they are laid out.

    Sequence r lies at `read_at[r] - lengths[r] + 1` to `read_at[r]` of the flattened `(B * T)` places. Two of 2 and 3
    tokens in padded rows of 4, `read_at` 1 and 6: the places read are 0 1 4 5 6.
    """
    before = lengths.cumsum(0) - lengths  # tokens of the sequences before each
    shift = (read_at - lengths + 1 - before).repeat_interleave(lengths)
    places = shift + torch.arange(len(shift), device=shift.device)
    return torch.segment_reduce(hidden.flatten(0, 1)[places].float(), "mean", lengths=lengths)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "last": lambda read_at, lengths: read_at,
    "first": lambda read_at, lengths: read_at - lengths + 1,  # [CLS] in BERT
    "mean": None,
    "decoder": lambda read_at, lengths: torch.arange(len(read_at), device=read_at.device),  # of (R, 1, H) states
}
"""`model.pooling`: from `read_at` `(R,)` and `lengths` `(R,)` the place of the token that sums up a sequence, `(R,)`;
None: all tokens are read."""


def pooled(pooling: str, hidden: Tensor, read_at: Tensor, lengths: Tensor) -> Tensor:
    """`(B, T, H)` hidden states, `read_at` `(R,)` and `lengths` `(R,)` -> a state a sequence, `(R, H)`."""
    place = POOLINGS[pooling]
    return mean(hidden, read_at, lengths) if place is None else hidden.flatten(0, 1)[place(read_at, lengths)]
