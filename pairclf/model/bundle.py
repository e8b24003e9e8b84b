"""The only reader and writer of saved models.

A bundle is a folder that holds all that a score needs but the base model's weights, and the proof that it scores as
it did when it was validated:

    bundle.json         manifest: hashes of every file, versions, base model, fold, metrics, the classes' prior, probe
                        rows with logits
    config.yaml         the resolved config: task, class order, rendering recipe, quantisation, ...
    tokenizer/          as transformers saves it
    adapter/            as peft saves it: opens with plain `PeftModel.from_pretrained`
    backbone/           instead of adapter/, where the whole model was trained, or adapters were merged into it; as its
                        own config.json says it may hold quantised weights (`pairclf export`)
    head.safetensors    float32; linear: weight (C, H) and bias (C,); two_layer: inner.weight (H, H), inner.bias (H,),
                        outer.weight (C, H), outer.bias (C,)
    trained_on.parquet  what `identity.prompt_marks` keeps of the prompts that it was trained on, sorted, each once
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pairclf.config import Config, Data, dump_config, parse_yaml, resolve
from pairclf.errors import BundleError
from pairclf.files import sha256_file, sha256_tree, write_json
from pairclf.inputs.render import InputBuilder
from pairclf.model.backbone import fingerprint, load_tokenizer, resolve_base
from pairclf.model.engine import Classifier, build_frozen
from pairclf.task import Row

MANIFEST = "bundle.json"
CONFIG = "config.yaml"
TRAINED_ON = "trained_on.parquet"
FORMAT = 4
_VERSIONS = ("pairclf", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest difference of a probe's logits between the machine that made a bundle and the one that loads it.

Wider than between two layouts on one machine (1e-5 and 2e-2): another CPU or GPU sums in another order.
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """A row that was scored when the bundle was made: `logits[order]` is `(C,)`, as the model gave them."""

    id: str
    fields: dict[str, list[str | None]]
    logits: list[list[float]]

    def row(self) -> Row:
        return Row(self.id, {name: tuple(turns) for name, turns in self.fields.items()})


@dataclass(frozen=True, slots=True)
class Manifest:
    """`bundle.json`.

    `prior` is the mean target `(C,)` of the training rows: what to say of a row that could not be scored. `seal` is
    the SHA-256 of all the other fields, so that a changed manifest shows.
    """

    format: int
    name: str
    fold: int | None
    base: str
    base_fingerprint: str
    dtype: str
    classes: list[str]
    metrics: dict[str, float]
    prior: list[float]
    versions: dict[str, str]
    files: dict[str, str]
    probes: list[Probe]
    seal: str = ""

    def sealed(self) -> str:
        plain = {name: value for name, value in asdict(self).items() if name != "seal"}
        return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are as they were saved; `load` makes the classifier of it."""

    folder: Path
    manifest: Manifest
    config: Config

    @property
    def name(self) -> str:
        return self.manifest.name

    def builder(self) -> InputBuilder:
        """The input builder with the bundle's own tokenizer and recipe."""
        tokenizer = load_tokenizer(str(self.folder / "tokenizer"), self.config.model)
        return InputBuilder(tokenizer, self.config.task, self.config.inputs)

    def trained_on(self) -> pl.DataFrame | None:
        """The prompts that the model was trained on, as `identity.prompt_marks` keeps them; None: nobody noted them.

        An older bundle has their hashes alone, and no column `sample`.
        """
        path = self.folder / TRAINED_ON
        return pl.read_parquet(path, glob=False) if path.is_file() else None

    def load(
        self, device: torch.device, base: Path | None = None, *, others: Sequence[torch.device] = ()
    ) -> Classifier:
        """The classifier on `device`, in evaluation mode, every weight of it read from the bundle or the base.

        Args:
            device: where it is to run; `model.dtype=auto` is decided for this device.
            base: folder of the base model on this machine, if it is not where `model.base` says.
            others: GPUs that the layers are laid over besides `device`, where one does not hold them all.

        Raises:
            BundleError: the base is another model, or a weight of the adapter or the head is missing.
            ModelError: the base can't be loaded.
        """
        classifier = _with_weights(self, device, base, others)
        _load_head(classifier, self.folder / "head.safetensors")
        return classifier.eval()


def base_fingerprint(config: Config, base: Path | None = None) -> str:
    """Fingerprint of the base model where its files are at hand; a hub id stands for itself."""
    source = resolve_base(config.model.base, base)
    return fingerprint(Path(source)) if Path(source).is_dir() else f"hub:{source}"


def write(
    new: Path,
    classifier: Classifier,
    config: Config,
    tokenizer: Any,
    *,
    name: str,
    fold: int | None,
    metrics: dict[str, float],
    prior: Sequence[float],
    probes: Sequence[Probe],
    trained_on: pl.DataFrame | None = None,
    stands_on: str | None = None,
) -> None:
    """Write a bundle into the empty folder `new`; the caller moves it to its place, once it has proven itself.

    A folder `backbone` that stands in `new`, as a quantiser wrote it, is left as it is; only the head is the
    classifier's then. `stands_on`: fingerprint of the base, where it need not be at hand.

    `prior`: mean target `(C,)` of the training rows. `trained_on`: `identity.prompt_marks` of all rows that any of
    the weights was trained on. Without them the bundle can't say what it has seen, and its scores are refused as a
    teacher's.
    """
    config = _portable(config)
    part = "adapter" if config.model.lora is not None else "backbone"
    # The embedding is never trained; without the word peft would look for the base on a hub to find out.
    options = {"save_embedding_layers": False} if part == "adapter" else {}
    if not (new / part).exists():
        classifier.backbone.save_pretrained(new / part, **options)  # type: ignore[operator]
    (new / part / "README.md").unlink(missing_ok=True)  # peft's empty model card names this machine's path
    _forget_path(new / part / "adapter_config.json", config.model.base)
    head = {name: tensor.detach().float().cpu().contiguous() for name, tensor in classifier.head.named_parameters()}
    save_file(head, new / "head.safetensors")
    tokenizer.save_pretrained(new / "tokenizer")
    if trained_on is not None:
        trained_on.unique("prompt").sort("prompt").write_parquet(new / TRAINED_ON)
    (new / CONFIG).write_text(dump_config(config), encoding="utf-8")
    manifest = Manifest(
        format=FORMAT,
        name=name,
        fold=fold,
        base=config.model.base,
        base_fingerprint=base_fingerprint(config) if stands_on is None else stands_on,
        dtype=str(classifier.dtype).removeprefix("torch."),
        classes=list(config.task.classes),
        metrics=metrics,
        prior=[float(one) for one in prior],
        versions={package: version(package) for package in _VERSIONS} | {"python": platform.python_version()},
        files=sha256_tree(new),
        probes=list(probes),
    )
    write_json(new / MANIFEST, asdict(manifest) | {"seal": manifest.sealed()})


def amend(folder: Path, *, metrics: dict[str, float], probes: Sequence[Probe]) -> None:
    """Let the manifest say how the bundle scores, where that was found out after it was written; the files stay."""
    manifest = replace(read_manifest(folder), metrics=metrics, probes=list(probes))
    write_json(folder / MANIFEST, asdict(manifest) | {"seal": manifest.sealed()})


def _portable(config: Config) -> Config:
    """The config without what only the machine that trained knows: its folders, and the user's name in them."""
    home = str(Path.home())
    base = config.model.base
    base = "~" + base[len(home) :] if base.startswith(home + "/") else base
    model = config.model.model_copy(update={"base": base})
    data = Data(rules=config.data.rules)  # what is repaired in a training row is repaired in a test row
    return config.model_copy(update={"output": None, "data": data, "model": model})


def _forget_path(adapter_config: Path, base: str) -> None:
    """Let the adapter name its base as the config does, not by a folder of the machine that trained it."""
    if adapter_config.is_file():
        settings = json.loads(adapter_config.read_text(encoding="utf-8"))
        write_json(adapter_config, settings | {"base_model_name_or_path": base})


def open_bundle(folder: Path, *, proven: bool = False) -> Bundle:
    """Read a bundle's manifest and config, and prove that no file of it was added, removed or changed.

    `proven`: the caller knows it, as another process of this run compares the hashes, which takes minutes of 18 GB; the
    manifest is proven by its seal, and the config by its hash, even so.

    Raises:
        BundleError: names the files that differ.
    """
    manifest, path = read_manifest(folder), folder / CONFIG
    if proven:
        _compare(
            folder, {CONFIG: manifest.files.get(CONFIG, "")}, {CONFIG: sha256_file(path)} if path.is_file() else {}
        )
    else:
        _compare(folder, manifest.files, sha256_tree(folder, without=frozenset({MANIFEST})))
    return Bundle(folder, manifest, resolve(parse_yaml(path.read_text(encoding="utf-8"), path), path))


def _compare(folder: Path, saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Do nothing if the hashes of files are as they were saved."""
    differing = sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))
    if differing:
        raise BundleError(
            f"{len(differing)} file(s) of the bundle are not as they were saved: {', '.join(differing[:5])}",
            where=folder,
            remedy="copy the bundle again from where it was trained",
        )


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest, proven by its seal; its files are not looked at, so that it takes no time.

    Raises:
        BundleError: there is none, it was changed, or its format is another.
    """
    path = folder / MANIFEST
    remedy = "give the folder that `pairclf train` or `pairclf cv` wrote, copied whole"
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it holds no {MANIFEST}", remedy=remedy)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**{**tree, "probes": [Probe(**probe) for probe in tree["probes"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{MANIFEST} is damaged: {error}", where=path, remedy=remedy) from error
    if manifest.format != FORMAT:
        raise BundleError(
            f"the bundle has format {manifest.format}, this pairclf reads format {FORMAT}",
            where=path,
            remedy=f"use pairclf {manifest.versions.get('pairclf')}, which wrote it",
        )
    if manifest.seal != manifest.sealed():
        raise BundleError(f"{MANIFEST} was changed after it was written", where=path, remedy=remedy)
    return manifest


def _with_weights(
    bundle: Bundle, device: torch.device, base: Path | None, others: Sequence[torch.device]
) -> Classifier:
    config = bundle.config
    if config.model.lora is None:
        return build_frozen(config, device, bundle.folder / "backbone", training=False, others=others)
    here, trained = base_fingerprint(config, base), bundle.manifest.base_fingerprint
    if here != trained and not trained.startswith("hub:"):
        raise BundleError(
            f"the base model {base or config.model.base} is not the one that the bundle was trained on",
            where=f"fingerprint {here[:16]}…, trained on {trained[:16]}…",
            remedy=f"attach {config.model.base} in the same version, or give its folder with --base",
        )
    classifier = build_frozen(config, device, base, training=False, others=others)
    folder = bundle.folder / "adapter"
    classifier.backbone = PeftModel.from_pretrained(classifier.backbone, str(folder))
    _assert_loaded(classifier.backbone, folder / "adapter_model.safetensors")
    return classifier


def _assert_loaded(backbone: Any, path: Path) -> None:
    """peft only warns when an adapter's weights do not fit (it then runs at random): compare them all."""
    saved, loaded = load_file(path), get_peft_model_state_dict(backbone, save_embedding_layers=False)
    wrong = sorted(
        name
        for name in saved.keys() | loaded.keys()
        if name not in saved or name not in loaded or not torch.equal(saved[name], loaded[name].cpu().to(saved[name]))
    )
    if wrong:
        raise BundleError(
            f"{len(wrong)} adapter weights did not arrive in the model, {wrong[0]} first",
            where=path,
            remedy="use the versions of peft and transformers in bundle.json, and the base it was trained on",
        )


def _load_head(classifier: Classifier, path: Path) -> None:
    try:
        classifier.head.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"the head can't be loaded: {' '.join(str(error).split())}", where=path) from error
