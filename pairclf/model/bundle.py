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

Whoever shares a bundle can seal what he likes. So it holds these files and no others, none of them a link or a device;
its adapter is built from config.yaml, and adapter_config.json must say the same; and its files can't let code be run,
nor another model be fetched (`folder.check_model_folder`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pairclf.config import MAX_YAML, Config, Data, dump_config, parse_yaml, resolve
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError, ModelError, cut, quoted
from pairclf.files import home_folder, read_plain, sha256_file, sha256_tree, write_json
from pairclf.inputs.render import InputBuilder
from pairclf.model.backbone import add_adapters, fingerprint, load_tokenizer, resolve_base
from pairclf.model.engine import Classifier, build_frozen
from pairclf.model.folder import ADAPTER_CONFIG, check_model_folder, read_json
from pairclf.task import Row, Task
from pairclf.trust import LINKED_FILES, REMOTE_CODE, granted

MANIFEST = "bundle.json"
CONFIG = "config.yaml"
TRAINED_ON = "trained_on.parquet"
FORMAT = 5
MAX_MANIFEST, MAX_PROMPTS, MAX_VALUES = 64 << 20, 100_000_000, 1024
"""Bytes of a manifest, and rows of `trained_on.parquet` and values in one (257 are needed): what a file of a few bytes
may not exceed once unpacked."""

_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json|(vocab|merges|dict)\.txt|"
    r"(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model|(source|target)\.spm|vocab\.bpe|bpe\.codes|"
    r"chat_template\.(jinja|json)"
)
_FILES = {
    "": r"bundle\.json|config\.yaml|trained_on\.parquet|head\.safetensors",
    "adapter": r"adapter_config\.json|adapter_model\.safetensors",
    "backbone": r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|quant_log\.csv|"
    rf"(generation_|quantize_)?config\.json|{_TOKENIZER}",
    "tokenizer": _TOKENIZER,
    "tokenizer/additional_chat_templates": r"[\w-]+\.jinja",
    "backbone/additional_chat_templates": r"[\w-]+\.jinja",
}
"""Names of files in each folder of a bundle; what has another name is refused."""

_CODE = {"backbone": r"[A-Za-z_]\w*\.py", "tokenizer": r"[A-Za-z_]\w*\.py"}
"""What may be there besides, where the person at the command trusts the bundle's code."""

_MARKS = ({"prompt": pl.UInt64}, {"prompt": pl.UInt64, "sample": pl.List(pl.UInt32)})
"""Columns of `trained_on.parquet`, in older bundles and in newer ones."""

_UNLIKE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""What may differ between adapter_config.json and the adapter that config.yaml describes: nothing hangs on it."""

_VERSIONS = ("pairclf", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest difference of a probe's logits between the machine that made a bundle and the one that loads it.

Wider than between two layouts on one machine (1e-5 and 2e-2): another CPU or GPU sums in another order.
"""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds characters that can't be printed")
    return text


def _dtype(name: str) -> str:
    if name not in TOLERANCE:
        raise ValueError(f"it must be one of {', '.join(TOLERANCE)}")
    return name


_Name = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """A row that was scored when the bundle was made: `logits[order]` is `(C,)`, as the model gave them."""

    __pydantic_config__ = _STRICT

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

    __pydantic_config__ = _STRICT

    format: int
    name: _Name
    fold: Annotated[int, Field(ge=0)] | None
    base: _Name
    base_fingerprint: _Name
    dtype: Annotated[str, AfterValidator(_dtype)]
    classes: list[_Name]
    metrics: dict[_Name, float]
    prior: list[Annotated[float, Field(ge=0, le=1)]]
    versions: dict[_Name, _Name]
    files: dict[_Name, _Name]
    probes: list[Probe]
    seal: str = ""

    def sealed(self) -> str:
        return _sealed(asdict(self))


def _sealed(tree: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in tree.items() if name != "seal"}
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
        tokenizer = load_tokenizer(str(self.folder / "tokenizer"))
        return InputBuilder(tokenizer, self.config.task, self.config.inputs)

    def trained_on(self) -> pl.DataFrame | None:
        """The prompts that the model was trained on, as `identity.prompt_marks` keeps them; None: nobody noted them.

        An older bundle has their hashes alone, and no column `sample`.

        Raises:
            BundleError: the file is no such table.
        """
        path = self.folder / TRAINED_ON
        if not path.is_file():
            return None
        try:
            told = pl.scan_parquet(path, glob=False)
            rows = told.select(pl.len()).collect().item()
            if told.collect_schema() in _MARKS and rows <= MAX_PROMPTS and _values(path) <= rows * MAX_VALUES:
                return told.collect()
            what = (
                f"it must hold the columns prompt (UInt64) and sample, at most {MAX_PROMPTS:,} rows, and in each at "
                f"most {MAX_VALUES:,} values"
            )
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException) as error:
            what = cut(error)
        raise BundleError(f"{TRAINED_ON} can't be used: {what}", where=path)

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


def _values(path: Path) -> int:
    """How many values a Parquet file says that it holds, those in lists one by one."""
    told = pq.read_metadata(path)
    groups = (told.row_group(number) for number in range(told.num_row_groups))
    return sum(group.column(number).num_values for group in groups for number in range(group.num_columns))


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
    _remove_unknown(new)
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
    home, base = home_folder(), config.model.base
    base = "~" + base[len(str(home)) :] if home is not None and base.startswith(f"{home}/") else base
    model = config.model.model_copy(update={"base": base})
    data = Data(rules=config.data.rules)  # what is repaired in a training row is repaired in a test row
    return config.model_copy(update={"output": None, "data": data, "model": model})


def _forget_path(adapter_config: Path, base: str) -> None:
    """Let the adapter name its base as the config does, not by a folder of the machine that trained it."""
    if adapter_config.is_file():
        write_json(adapter_config, read_json(adapter_config) | {"base_model_name_or_path": base})


def open_bundle(folder: Path, *, proven: bool = False) -> Bundle:
    """Read a bundle's manifest and config, and prove that no file of it was added, removed or changed.

    `proven`: the caller knows it, as another process of this run compares the hashes, which takes minutes of 18 GB; the
    manifest is proven by its seal, and the config by its hash, even so.

    Raises:
        BundleError: names the files that differ, or do not belong there, or what in one of them can't be used.
    """
    manifest, path = read_manifest(folder), folder / CONFIG
    if proven:
        _compare(
            folder, {CONFIG: manifest.files.get(CONFIG, "")}, {CONFIG: sha256_file(path)} if path.is_file() else {}
        )
    else:
        _compare(folder, manifest.files, sha256_tree(folder, without=frozenset({MANIFEST})))
    try:
        config = resolve(parse_yaml(read_plain(path, MAX_YAML), path), path)
        for part in ("tokenizer", "backbone"):
            if (folder / part).is_dir():
                check_model_folder(folder / part)
    except (OSError, ValueError) as error:
        raise BundleError(f"{CONFIG} can't be read: {cut(error)}", where=path) from error
    except (ConfigError, ModelError) as error:
        raise BundleError(error.what, where=error.where, remedy=error.remedy) from error
    if wrong := _contradiction(manifest, config):
        raise BundleError(f"{MANIFEST} and {CONFIG} contradict each other: {wrong}", where=folder)
    return Bundle(folder, manifest, config)


def _contradiction(manifest: Manifest, config: Config) -> str | None:
    """What in a manifest can't be of a model with this config."""
    task: Task = config.task
    classes, orders = len(task.classes), 2 if task.swappable else 1
    if manifest.classes != list(task.classes):
        return f"classes {quoted(manifest.classes)}, and the task has {quoted(list(task.classes))}"
    if manifest.base != config.model.base:
        return f"base {quoted(manifest.base)}, and model.base is {quoted(config.model.base)}"
    if len(manifest.prior) != classes or (not task.multi_label and abs(sum(manifest.prior) - 1) > 1e-3):
        return f"prior {quoted(manifest.prior)} is not one of {classes} classes"
    for probe in manifest.probes:
        if probe.fields.keys() != set(task.fields):
            return f"probe {quoted(probe.id)} has fields {quoted(list(probe.fields))}"
        if [len(one) for one in probe.logits] != [classes] * orders:
            return f"probe {quoted(probe.id)} must have {classes} logits in each of {orders} orders"
    return None


def _unknown(folder: Path, part: str = "") -> Iterator[tuple[str, str]]:
    """`(posix path, why)` of what does not belong in a bundle. Nothing is opened, and no link is followed."""
    names, trust = _FILES[part], granted()
    names += "|" + _CODE[part] if trust.remote_code and part in _CODE else ""
    for entry in sorted(os.scandir(folder / part), key=lambda entry: entry.name):
        name = f"{part}/{entry.name}" if part else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _unknown(folder, name) if name in _FILES else [(name, "an unknown folder")]
        elif entry.is_symlink() and not (trust.linked_files and Path(entry.path).is_file()):
            yield name, f"a link (links to files are permitted by {LINKED_FILES})"
        elif not entry.is_file():
            yield name, "no regular file"
        elif not re.fullmatch(names, entry.name):
            code = entry.name.endswith(".py")
            yield name, f"code (permitted by {REMOTE_CODE})" if code else "an unknown file"


def _refuse_unknown(folder: Path) -> None:
    """Raises `BundleError` if something in the folder does not belong in a bundle."""
    if found := list(islice(_unknown(folder), 5)):
        shown = "; ".join(f"{quoted(name)}: {why}" for name, why in found)
        raise BundleError(
            f"the bundle's folder holds files that are not part of a bundle: {shown}",
            where=folder,
            remedy="move them out of the folder, such as .DS_Store or README.md: it may hold only what `pairclf train` "
            "writes (docs/prediction.md)",
        )


def _remove_unknown(new: Path) -> None:
    """Files that a tokenizer or a quantiser wrote besides, from a bundle that is being written; it is proven later."""
    for name, _ in list(_unknown(new)):
        if (new / name).is_file():
            console.print(f"note: {name} is not kept in the bundle")
            (new / name).unlink()


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
        BundleError: there is none, it was changed, its format is another, or the folder holds other things too.
    """
    path = folder / MANIFEST
    remedy = "give a bundle's folder, such as RUN/fold0/bundle, copied whole"
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it holds no {MANIFEST}", remedy=remedy)
    _refuse_unknown(folder)
    try:
        text = read_plain(path, MAX_MANIFEST)
        tree = json.loads(text)
        if isinstance(tree, dict) and tree.get("format") == FORMAT:
            manifest, seal = _MANIFEST.validate_json(text), _sealed(tree)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is damaged: {_why(error)}", where=path, remedy=remedy) from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        told = tree if isinstance(tree, dict) else {}
        raise BundleError(
            f"the bundle has format {quoted(told.get('format'))}, this pairclf reads format {FORMAT}",
            where=path,
            remedy="train it again with this pairclf, or use it with the version of pairclf that wrote it",
        )
    if manifest.seal != seal:
        raise BundleError(f"{MANIFEST} was changed after it was written", where=path, remedy=remedy)
    return manifest


_MANIFEST = TypeAdapter(Manifest)


def _why(error: Exception) -> str:
    """The first thing that is wrong with a manifest."""
    if not isinstance(error, ValidationError):
        return cut(error)
    first = error.errors()[0]
    return f"{cut('.'.join(map(str, first['loc'])))}: {cut(first['msg'])} (given: {quoted(first['input'])})"


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
    # peft's own `from_pretrained` would let adapter_config.json say what is adapted: a regex that never ends, for one.
    classifier.backbone = add_adapters(classifier.backbone, config.model.lora).requires_grad_(False)
    _compare_adapter_config(folder / ADAPTER_CONFIG, classifier.backbone)
    _fill_adapter(classifier.backbone, folder / "adapter_model.safetensors")
    return classifier


def _compare_adapter_config(path: Path, backbone: Any) -> None:
    """Raises `BundleError` unless peft, reading the file, would make the adapter that config.yaml describes."""
    try:
        said = read_json(path)
    except ModelError as error:
        raise BundleError(error.what, where=path) from error
    wanted = json.loads(json.dumps(backbone.peft_config["default"].to_dict(), default=list))
    for name, value in wanted.items() if isinstance(said, dict) else ():
        one, other = (sorted(x) if isinstance(x, list) else x for x in (said.get(name, value), value))
        if name not in _UNLIKE and one != other:
            raise BundleError(
                f"{ADAPTER_CONFIG} says {name}: {quoted(one)}, and {CONFIG} makes it {quoted(other)}", where=path
            )


def _fill_adapter(backbone: Any, path: Path) -> None:
    """peft only warns when an adapter's weights do not fit (it then runs at random): compare them all."""
    try:
        saved = load_file(path)
        set_peft_model_state_dict(backbone, dict(saved))
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise BundleError(f"the adapter can't be loaded: {cut(' '.join(str(error).split()))}", where=path) from error
    loaded = get_peft_model_state_dict(backbone, save_embedding_layers=False)
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
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"the head can't be loaded: {cut(' '.join(str(error).split()))}", where=path) from error
