"""Export a bundle for transformers alone: a folder that `AutoModelForSequenceClassification` opens, equal in logits.

Our head is one linear layer on a state. That of transformers' classes for decoders is one, too, without a bias. Those
for encoders have a layer and an activation before it, which are set to change nothing within float32's precision: a
tanh of a ten-thousandth of the state, or a GELU far on its straight side. A reward model is a stock one with one label,
which is given a prompt and one answer.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

from pairclf.approaches.finetune.merge import load_whole, without_adapter
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.console import console
from pairclf.errors import ModelError
from pairclf.files import atomic_folder
from pairclf.inputs.sequences import branches_of
from pairclf.inputs.truncate import Ids
from pairclf.model.backbone import load_tokenizer
from pairclf.model.engine import Classifier
from pairclf.model.readout import LinearHead, RewardHead, TwoLayerHead
from pairclf.model.scoring import items_of, score
from pairclf.scores.metrics import Floats
from pairclf.task import REWARD

CONFIG = "config.json"

TOLERANCE = 1e-4
"""Largest difference of a probe's logit from our own, in float32."""

SCALE, SHIFT = 1e-4, 64.0
"""tanh(x) is x within x^3 / 3, and a GELU is the identity above 6: states, which are normalised, stay far within."""


class _Layers(NamedTuple):
    """Names of the layers of a stock head: the one before the activation, and the last one."""

    dense: str
    last: str
    activation: str


_ENCODERS = {
    "bert": _Layers("bert.pooler.dense", "classifier", "tanh"),
    "roberta": _Layers("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": _Layers("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": _Layers("classifier.dense", "classifier.out_proj", "gelu"),
    "deberta-v2": _Layers("pooler.dense", "classifier", "gelu"),
}
"""By `model_type`: encoders whose stock head is a layer, an activation and a layer on the first state."""


def export_stock(folder: Path, out: Path, *, base: Path | None = None) -> Path:
    """Write a bundle as a folder of transformers' class for sequence classification, in float32.

    The folder is read back, and scores the bundle's probe rows, before it is put in its place. A row's tokens are those
    that `pairclf show` prints: the recipe lies in `pairclf.yaml`, and the tokenizer beside it adds no wording.

    Args:
        folder: of the bundle.
        out: the folder to write.
        base: folder of the base model on this machine.

    Raises:
        BundleError: a file of the bundle was changed.
        ModelError: transformers has no such class of this architecture, its head is none that ours can be written as,
            or the logits differ.
    """
    bundle = open_bundle(folder)
    bundle.config.require("model", "export")
    if bundle.config.model.readout == "label_tokens":
        raise _refusal(bundle, "model.readout=label_tokens reads the LM head, and that class has none")
    with atomic_folder(out, known_by=CONFIG) as new:
        classifier, _ = load_whole(bundle, new, "float32", base)
        classifier = without_adapter(classifier, torch.float32).eval()
        tokenizer = load_tokenizer(str(bundle.files.tokenizer))
        pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        stock = _stock_model(bundle, classifier, pad)
        _fill_head(bundle, classifier, stock)
        stock.save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.copyfile(bundle.files.config, new / "pairclf.yaml")
        difference, change = _compare(bundle, classifier, new, pad)
    console.print(
        f"saved {out}, equal to {bundle.name} in float32 (logits differ by {difference:.1g}), and by {change:.1g} from "
        "those of the bundle as it is"
    )
    return out


def _refusal(bundle: Bundle, why: str, remedy: str = "use pairclf.load, or pairclf export --to float32") -> ModelError:
    return ModelError(
        f"{bundle.name} can't be written for AutoModelForSequenceClassification: {why}",
        where=bundle.folder,
        remedy=remedy,
    )


def _stock_model(bundle: Bundle, classifier: Classifier, pad: int) -> Any:
    """A model of transformers' class with the backbone's weights, and a head to fill."""
    settings: Any = copy.deepcopy(classifier.backbone.config)
    if type(settings) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise _refusal(bundle, f"transformers has no such class for model_type={settings.model_type}")
    pooling = "last" if classifier.family.causal else "first"
    if classifier.pooling != pooling:
        raise _refusal(bundle, f"model.pooling={classifier.pooling}, and that class reads the {pooling} token's state")
    task, rewards = bundle.config.task, isinstance(classifier.head, RewardHead)
    if rewards and not classifier.family.causal:
        raise _refusal(bundle, "the first token of a side's text, which the rewards of an encoder read, is not its own")
    labels = (REWARD,) if rewards else task.classes
    settings.id2label = dict(enumerate(labels))
    settings.label2id = {name: place for place, name in enumerate(labels)}
    of_classes = "multi_label_classification" if task.multi_label else "single_label_classification"
    settings.problem_type = "regression" if rewards else of_classes
    if classifier.family.causal or settings.pad_token_id is None:
        settings.pad_token_id = pad  # the class reads the last other token; RoBERTa counts positions by its own
    settings._attn_implementation = None  # ours is registered under a name that transformers alone has not
    settings.dtype = torch.float32
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(settings)]
    stock: Any = kind(settings).eval()
    inner = getattr(stock, stock.base_model_prefix)
    missing, unexpected = inner.load_state_dict(classifier.backbone.state_dict(), strict=False)
    if unexpected or any(not name.startswith("pooler.") for name in missing):
        raise _refusal(bundle, f"its backbone has other weights: {', '.join([*unexpected, *missing][:3])}")
    return stock


@torch.no_grad()
def _fill_head(bundle: Bundle, classifier: Classifier, stock: Any) -> None:
    head, kind = classifier.head, stock.config.model_type
    if kind in _ENCODERS:
        layers = _ENCODERS[kind]
        dense, last = stock.get_submodule(layers.dense), stock.get_submodule(layers.last)
        if isinstance(head, TwoLayerHead):
            if layers.activation != "gelu":
                raise _refusal(
                    bundle, f"model.head=two_layer has a GELU, and the class of {kind} a {layers.activation}"
                )
            _copy(dense, head.inner.weight, head.inner.bias)
            _copy(last, head.outer.weight, head.outer.bias)
            return
        assert isinstance(head, LinearHead)
        weight, identity = head.weight, torch.eye(head.in_features)
        if layers.activation == "tanh":
            _copy(dense, SCALE * identity, torch.zeros(head.in_features))
            _copy(last, weight / SCALE, _bias(head))
        else:
            _copy(dense, identity, torch.full((head.in_features,), SHIFT))
            _copy(last, weight, (_bias(head).double() - SHIFT * weight.double().sum(dim=1)).float())
        return
    score_layer = getattr(stock, "score", None)
    if not isinstance(score_layer, nn.Linear) or not isinstance(head, LinearHead | RewardHead):
        raise _refusal(bundle, f"the head of the class of {kind} is none that model.head={bundle.config.model.head} is")
    if score_layer.bias is None and bool(_bias(head).any()):
        raise _refusal(
            bundle,
            f"the class of {kind} has a head without a bias, and this one was trained with one. A bias moves a class "
            "by a constant, and no weights on a normalised state do that",
            remedy="train with model.head_bias=false; pairclf.load and pairclf export --to float32 keep a bias",
        )
    score_layer.weight.copy_(head.weight)
    if score_layer.bias is not None:
        score_layer.bias.copy_(_bias(head))


def _bias(head: LinearHead | RewardHead) -> Tensor:
    bias = head.bias if isinstance(head, LinearHead) else None
    return torch.zeros(len(head.weight)) if bias is None else bias


def _copy(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _compare(bundle: Bundle, classifier: Classifier, new: Path, pad: int) -> tuple[float, float]:
    """Largest difference of a probe's logit between the folder and ours in float32, and the bundle as it was made."""
    probes = bundle.manifest.probes
    if not probes:
        raise _refusal(bundle, "it holds no probe rows, by which the export could be compared")
    items = items_of(builder_of(bundle).encode([probe.row() for probe in probes]), orders=2)
    ours = score(classifier, items, tokens_per_batch=None, visible=False)
    stock: Any = AutoModelForSequenceClassification.from_pretrained(new, dtype=torch.float32).eval()
    theirs = _logits(stock, [ids for item in items for ids in branches_of(item.ids)], pad)
    if isinstance(classifier.head, RewardHead):
        with torch.inference_mode():
            theirs = classifier.head.logits_of(torch.from_numpy(theirs).view(-1, 2)).double().numpy()
    difference = float(np.abs(theirs - ours).max())
    if not difference <= TOLERANCE:
        raise _refusal(bundle, f"its logits differ by {difference:.2g}, and {TOLERANCE:g} is permitted")
    made = np.array([probes[item.row].logits[item.order] for item in items])
    return difference, float(np.abs(theirs - made).max())


@torch.inference_mode()
def _logits(stock: Any, sequences: Sequence[Ids], pad: int) -> Floats:
    """Logits `(N, C)` of a stock model, in padded batches as its users make them."""
    parts = []
    for start in range(0, len(sequences), 4):
        ids = [torch.from_numpy(sequence).long() for sequence in sequences[start : start + 4]]
        batch = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
        parts.append(stock(input_ids=batch, attention_mask=mask).logits.double().numpy())
    return np.concatenate(parts)
