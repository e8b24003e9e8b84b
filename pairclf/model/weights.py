"""The weights of a language model in a bundle: written once, and read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pairclf.bundles.base import base_fingerprint
from pairclf.bundles.bundle import Bundle, Saved, portable
from pairclf.bundles.contents import CONFIG, MANIFEST, BundleFiles
from pairclf.bundles.manifest import Weights
from pairclf.bundles.model_files import ADAPTER_CONFIG, read_json
from pairclf.config import Config
from pairclf.errors import BundleError, ModelError, cut, quoted
from pairclf.files import write_json
from pairclf.model.backbone import add_adapters, name_of
from pairclf.model.engine import Classifier, build_frozen

_UNLIKE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Keys of adapter_config.json that may differ from the adapter of config.yaml: they change no score."""

_PACKAGES = ("pairclf", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")


def save_weights(
    new: Path, classifier: Classifier, config: Config, tokenizer: Any, *, fingerprint: str | None = None
) -> Saved:
    """Write adapter or backbone, head and tokenizer into the folder `new` of a bundle.

    A backbone that stands there already, as a quantiser wrote it, is left as it is; only the head is the classifier's
    then.

    Args:
        fingerprint: of the base, where it need not be at hand.
    """
    files, base, weights = BundleFiles(new), portable(config).model.base, _weights_of(config)
    part = files.adapter if weights == "adapter" else files.backbone
    # The embedding is never trained; without the word peft would look for the base on a hub to find out.
    options = {"save_embedding_layers": False} if weights == "adapter" else {}
    if weights != "base" and not part.exists():
        classifier.backbone.save_pretrained(part, **options)  # type: ignore[operator]
    (part / "README.md").unlink(missing_ok=True)  # peft's empty model card names this machine's path
    _forget_path(part / ADAPTER_CONFIG, base)
    head = {name: tensor.detach().float().cpu().contiguous() for name, tensor in classifier.head.named_parameters()}
    save_file(head, files.head)
    tokenizer.save_pretrained(files.tokenizer)
    return Saved(
        config.approach,
        weights,
        name_of(classifier.dtype),
        _PACKAGES,
        base_fingerprint(config) if fingerprint is None else fingerprint,
    )


def _weights_of(config: Config) -> Weights:
    """Where a bundle of this config has the weights of its language model."""
    if config.trains_all:
        return "whole"
    return "base" if config.model.lora is None else "adapter"


def load_classifier(
    bundle: Bundle, device: torch.device, base: Path | None = None, *, others: Sequence[torch.device] = ()
) -> Classifier:
    """The classifier on `device`, in evaluation mode, every weight of it read from the bundle or the base.

    Args:
        bundle: of a language model.
        device: where it is to run; `model.dtype=auto` is decided for this device.
        base: folder of the base model on this machine, if it is not where `model.base` says.
        others: GPUs that the layers are laid over besides `device`, where one does not hold them all.

    Raises:
        BundleError: the base is another model, or a weight of the adapter or the head is missing.
        ModelError: the base can't be loaded.
    """
    classifier = _with_weights(bundle, device, base, others)
    _load_head(classifier, bundle.files.head)
    return classifier.eval()


def _forget_path(adapter_config: Path, base: str) -> None:
    """Let the adapter name its base as the config does, not by a folder of the machine that trained it."""
    if adapter_config.is_file():
        write_json(adapter_config, read_json(adapter_config) | {"base_model_name_or_path": base})


def _with_weights(
    bundle: Bundle, device: torch.device, base: Path | None, others: Sequence[torch.device]
) -> Classifier:
    config, lora = bundle.config, bundle.config.model.lora
    if bundle.manifest.weights != _weights_of(config):
        raise BundleError(
            f"{MANIFEST} says weights: {bundle.manifest.weights}, and {CONFIG} says model.lora: {lora} and "
            f"train.max_steps: {config.train.max_steps}",
            where=bundle.folder,
        )
    options: dict[str, Any] = {"training": False, "others": others, "tokenizer": bundle.files.tokenizer}
    if bundle.manifest.weights == "whole":
        return build_frozen(config, device, bundle.files.backbone, **options)
    actual, trained = base_fingerprint(config, base), str(bundle.manifest.base_fingerprint)
    if actual != trained and not trained.startswith("hub:"):
        raise BundleError(
            f"the base model {base or config.model.base} is not the one that the bundle was trained on",
            where=f"fingerprint {actual[:16]}…, trained on {trained[:16]}…",
            remedy=f"attach {config.model.base} in the same version, or give its folder with --base",
        )
    classifier = build_frozen(config, device, base, **options)
    if lora is None:
        return classifier
    # peft's own `from_pretrained` would let adapter_config.json say what is adapted: a regex that never ends, for one.
    classifier.backbone = add_adapters(classifier.backbone, lora).requires_grad_(False)
    _compare_adapter_config(bundle.files.adapter / ADAPTER_CONFIG, classifier.backbone)
    try:
        weights = load_file(bundle.files.adapter_weights)
    except (OSError, SafetensorError) as error:
        raise _unloadable("adapter", bundle.files.adapter_weights, error) from error
    fill_adapter(classifier.backbone, weights, bundle.files.adapter_weights)
    return classifier


def _compare_adapter_config(path: Path, backbone: Any) -> None:
    """Raises `BundleError` unless peft, reading the file, would make the adapter that config.yaml describes."""
    try:
        saved_config = read_json(path)
    except ModelError as error:
        raise BundleError(error.what, where=path) from error
    expected = json.loads(json.dumps(backbone.peft_config["default"].to_dict(), default=list))
    for name, value in expected.items() if isinstance(saved_config, dict) else ():
        saved, value_made = (sorted(x) if isinstance(x, list) else x for x in (saved_config.get(name, value), value))
        if name not in _UNLIKE and saved != value_made:
            raise BundleError(
                f"{ADAPTER_CONFIG} says {name}: {quoted(saved)}, and {CONFIG} makes it {quoted(value_made)}", where=path
            )


def fill_adapter(backbone: Any, weights: Mapping[str, Tensor], where: Path | None = None) -> None:
    """Load all weights of the backbone's adapter. peft only warns when some do not fit, and runs at random.

    Raises:
        BundleError: a weight is missing, unknown or of another shape.
    """
    try:
        set_peft_model_state_dict(backbone, dict(weights))
    except (RuntimeError, KeyError) as error:
        raise _unloadable("adapter", where, error) from error
    loaded = get_peft_model_state_dict(backbone, save_embedding_layers=False)
    both = weights.keys() & loaded.keys()
    lost = {name for name in both if not torch.equal(weights[name], loaded[name].cpu().to(weights[name]))}
    if wrong := sorted(lost | (weights.keys() ^ loaded.keys())):
        raise BundleError(
            f"{len(wrong)} adapter weights did not arrive in the model, {wrong[0]} first",
            where=where,
            remedy="use the versions of peft and transformers in bundle.json, and the base it was trained on",
        )


def _load_head(classifier: Classifier, path: Path) -> None:
    try:
        classifier.head.load_state_dict(load_file(path), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _unloadable("head", path, error) from error


def _unloadable(part: str, where: Path | None, error: Exception) -> BundleError:
    return BundleError(f"the {part} can't be loaded: {cut(' '.join(str(error).split()))}", where=where)
