"""After training: several folds' adapters averaged into one, or an adapter merged into weights that are not quantised.

Either makes another model than the one that was validated, so it is scored again, as it stands on disk, on rows that
were held out; where its log loss moved more than is allowed, nothing of it is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from pairclf.config import Config, Lora, override
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError
from pairclf.files import atomic_folder
from pairclf.jobs.fit import free_memory, pick_probes
from pairclf.jobs.proof import Sample, compare, draw, judge, logits_of, probabilities_of, reference, render
from pairclf.jobs.run import Paths, bundles_of, output_of
from pairclf.jobs.scoring import Floats, by_order
from pairclf.model.backbone import add_adapters, empty_model, load_tokenizer, pick_device, read_settings, resolve_base
from pairclf.model.bundle import MANIFEST, Bundle, Probe, amend, open_bundle, write
from pairclf.model.engine import Classifier
from pairclf.task import AB

Average = Literal["exact", "factors"]
Into = Literal["bfloat16", "float16", "float32"]
Weights = Mapping[str, Tensor]


class Part(NamedTuple):
    """A bundle to be merged, with its weights on the CPU."""

    bundle: Bundle
    adapter: Weights
    head: Weights


def merge(
    config: Config,
    out: Path,
    *,
    max_shift: float,
    folds: Sequence[int] = (),
    average: str = "exact",
    into: str | None = None,
    rows: int | None = None,
    base: Path | None = None,
) -> Path:
    """Merge bundles of a run into the bundle `out`, unless its log loss moves too far.

    Args:
        config: of the run.
        out: folder of the new bundle; an older bundle there is replaced.
        max_shift: largest move of the log loss, in nats a row; see `judge`.
        folds: whose bundles; none: all that the run has.
        average: how several adapters are averaged: exact, the mean of their products BA; factors, the products of
            the means of B and of A.
        into: dtype of the whole weights to write; None: an adapter is written.
        rows: score so many rows, drawn by `config.seed`; None: all.
        base: folder of the base model on this machine.

    Raises:
        ConfigError: there is nothing to merge, or `out` is one of the parts.
        BundleError: the bundles don't belong together, the disk is too small, or the log loss moved too far.
        DataError: the out-of-fold scores are not those of the bundles, or not of these rows.
    """
    check_choice("average", average, Average)
    check_choice("into", into or "bfloat16", Into)
    parts = open_parts(config, folds, out, into)
    bundles = [part.bundle for part in parts]
    sample = draw(config, bundles, rows)
    name = "-".join([*output_of(config).parts[-1:], *(part.bundle.folder.parent.name for part in parts), "merged"])
    with atomic_folder(out, known_by=MANIFEST) as new:
        drift = _build(parts, new, name, average=average, into=into, base=base)
        free_memory()
        logits = logits_of(open_bundle(new), [sample.items], base)[0]
        after = probabilities_of(bundles[0], sample, logits)
        before = reference(bundles, sample, base)
        shift = compare(sample, before, after, config.task, parts=len(parts), done="merged", drift=drift)
        console.print(render(shift, config.task))
        judge(shift, max_shift, out)
        amend(new, metrics=shift.metrics, probes=_probes(sample, logits))
    console.print(f"saved {out}, scored as it was read back: log loss moved by {shift.moved:+.5f}")
    return out


def check_choice(name: str, value: str, choices: Any) -> None:
    """Do nothing if `--name value` is one of a Literal's."""
    if value not in get_args(choices):
        raise ConfigError(f"--{name} {value} is unknown", remedy=f"one of {', '.join(get_args(choices))}")


def _probes(sample: Sample, logits: Floats) -> list[Probe]:
    lengths = [len(item.ids) for item in sample.items if item.order == AB]
    return pick_probes(sample.rows, lengths, by_order(sample.items, logits, len(sample.rows)))


# --- the parts -------------------------------------------------------------------------------------------------------


def open_parts(config: Config, folds: Sequence[int], out: Path, into: str | None) -> list[Part]:
    """The bundles of `folds` (of all, if none is given), which must be of one kind.

    Raises:
        ConfigError: a fold is named twice or has no bundle; one bundle and no `into`; `out` would spoil a part.
        BundleError: a bundle was changed, holds no adapter, or differs from the others.
    """
    if len(set(folds)) != len(folds):
        raise ConfigError(f"--fold names a fold twice: {', '.join(map(str, folds))}")
    folders = [Paths(output_of(config), fold).bundle for fold in folds] or bundles_of(config)
    check_folders(folders, out)
    if len(folders) == 1 and into is None:
        raise ConfigError(
            f"{folders[0]} is one bundle with its adapter, and nothing is to be done with it",
            remedy="give --into bfloat16 to merge the adapter into the weights, or several folds to average",
        )
    bundles = [open_bundle(folder) for folder in folders]
    check_alike(bundles)
    return [Part(one, load_file(_adapter(one)), load_file(one.folder / "head.safetensors")) for one in bundles]


def check_folders(folders: Sequence[Path], out: Path) -> None:
    """Do nothing if the folders of bundles are there, and `out` is none of them and in none of them.

    Raises:
        ConfigError: otherwise.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"{missing[0]} does not exist", remedy="run `pairclf train CONFIG --fold N` first")
    if spoilt := [folder for folder in folders if folder.resolve() in (out.resolve(), *out.resolve().parents)]:
        raise ConfigError(f"--out {out} would overwrite {spoilt[0]}, which is read", remedy="give a new folder")


def _adapter(bundle: Bundle) -> Path:
    return bundle.folder / "adapter" / "adapter_model.safetensors"


def check_alike(bundles: Sequence[Bundle]) -> None:
    """Do nothing if the bundles have adapters of one kind for one base, task and recipe.

    Raises:
        BundleError: names what differs, or why there can be no mean.
    """
    first, several = bundles[0], len(bundles) > 1
    for one in bundles:
        if one.config.model.lora is None:
            raise BundleError(
                f"bundle {one.name} holds the whole model and no adapter: there is nothing to merge", where=one.folder
            )
        if several and one.config.model.lora.dora:
            raise BundleError(
                "adapters with DoRA can't be averaged: each scales its weights to norms of its own, which fit its own "
                "direction and no mean of several",
                where=one.folder,
                remedy="merge one fold with --fold N --into DTYPE, or predict with all bundles",
            )
    wanted = _traits(first)
    for other in bundles[1:]:
        found = _traits(other)
        if differing := [name for name in wanted if wanted[name] != found[name]]:
            shown = ", ".join(_difference(name, wanted[name], found[name]) for name in differing)
            raise BundleError(
                f"bundles {first.name} and {other.name} differ in {shown}; weights of unlike models have no mean",
                where=other.folder,
                remedy="choose folds that were trained alike with --fold, or train them again",
            )


def _traits(bundle: Bundle) -> dict[str, object]:
    """What must be equal for weights to mean the same, and scores to be comparable; `check_alike` names the keys."""
    model, inputs = bundle.config.model, bundle.config.inputs.model_dump(exclude={"processes"})
    lora = {} if model.lora is None else model.lora.model_dump(exclude={"dropout"})
    return {
        "task": bundle.config.task,
        "base model": bundle.manifest.base_fingerprint,
        "tokenizer": bundle.manifest.files.get("tokenizer/tokenizer.json"),
        **{f"inputs.{name}": value for name, value in inputs.items()},
        **{f"model.{name}": getattr(model, name) for name in ("quantization", "head", "pooling")},
        **{f"model.lora.{name}": value for name, value in lora.items()},
        "predict.temperature": bundle.config.predict.temperature,
    }


def _difference(name: str, one: object, other: object) -> str:
    short = isinstance(one, str | int | float) and len(f"{one}{other}") <= 60
    return f"{name} ({one} and {other})" if short else name


# --- the weights -----------------------------------------------------------------------------------------------------


def mean_of_factors(parts: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of each tensor: of A and of B for an adapter (LMSYS 1), of weight and bias for a head."""
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}


def mean_of_products(parts: Sequence[Weights], lora: Lora) -> dict[str, Tensor]:
    """A's `(r, in)` under each other and B's `(out, r)` side by side, for rank `n * r` and the same `alpha`.

    peft multiplies by alpha / rank, which is now an n-th of what it was: the sum of the products becomes their mean.
    Under rsLoRA it is alpha / sqrt(rank), and B takes the other 1 / sqrt(n).
    """
    rest = len(parts) ** -0.5 if lora.rslora else 1.0
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        joined[name] = torch.cat(tensors) if _is_a(name) else torch.cat(tensors, dim=1) * rest
    return joined


def _is_a(name: str) -> bool:
    """`...q_proj.lora_A.weight`; what is left is `...q_proj.lora_B.weight`, as DoRA's magnitudes are never averaged."""
    return ".lora_A." in name


def drift_of_factors(parts: Sequence[Weights]) -> float:
    """How far `mean_of_factors` is from the mean of the products: norm of the difference / norm of that mean.

    Norms are Frobenius', over all modules, from Gram matrices: no product BA of the size of a weight is formed.
    """
    mean, n = mean_of_factors(parts), len(parts)
    wrong = exact = 0.0
    for name in filter(_is_a, parts[0]):
        twin = name.replace(".lora_A.", ".lora_B.")
        a = torch.cat([part[name] for part in parts]).double()
        b = torch.cat([part[twin] / n for part in parts], dim=1).double()
        exact += _squared_norm(b, a)
        wrong += _squared_norm(torch.cat([b, -mean[twin].double()], dim=1), torch.cat([a, mean[name].double()]))
    return float((wrong / exact) ** 0.5) if exact else 0.0


def _squared_norm(b: Tensor, a: Tensor) -> float:
    """`|BA|^2 = trace(B'B AA')`, which rounding must not take below 0."""
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def _build(
    parts: Sequence[Part], new: Path, name: str, *, average: str, into: str | None, base: Path | None
) -> float | None:
    """Write the merged bundle, not yet scored, into the empty folder `new`.

    Returns:
        The drift of the mean of factors, where that was taken.
    """
    first, drift = parts[0].bundle, None
    if into is None:  # adapters are filled where their quantised base can be
        config = first.config if base is None else _with_model(first.config, base=str(base))
        classifier = first.load(pick_device(), base)
    else:
        classifier, config = load_whole(first, new, into, base)
    if len(parts) > 1:
        lora, drift = _average(classifier, parts, average)
        config = _with_model(config, lora=lora)
    if into is not None:
        config = override(config, ["model.lora=null", f"model.dtype={into}"])
        classifier = without_adapter(classifier, getattr(torch, into))
    tokenizer = load_tokenizer(str(first.folder / "tokenizer"))
    fold = first.manifest.fold if len(parts) == 1 else None
    seen = [part.bundle.trained_on() for part in parts]
    known = [one for one in seen if one is not None]
    trained_on = pl.concat(known, how="diagonal") if len(known) == len(seen) else None
    prior = np.mean([part.bundle.manifest.prior for part in parts], axis=0).tolist()
    write(
        new,
        classifier,
        config,
        tokenizer,
        name=name,
        fold=fold,
        metrics={},
        prior=prior,
        probes=[],
        trained_on=trained_on,
    )
    return drift


def _with_model(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _average(classifier: Classifier, parts: Sequence[Part], average: str) -> tuple[Lora, float | None]:
    """Put the mean of the parts in the place of the first one's adapter and head; the drift, for factors alone."""
    lora = parts[0].bundle.config.model.lora
    assert lora is not None  # `check_alike`
    adapters = [part.adapter for part in parts]
    if average == "exact":
        mean, drift = mean_of_products(adapters, lora), None
        lora = lora.model_copy(update={"rank": len(parts) * lora.rank})
    else:
        mean, drift = mean_of_factors(adapters), drift_of_factors(adapters)
    classifier.backbone = add_adapters(classifier.backbone.unload(), lora)  # type: ignore[operator]
    fill_adapter(classifier.backbone, mean)
    classifier.head.load_state_dict(mean_of_factors([part.head for part in parts]), strict=True)
    return lora, drift


def fill_adapter(backbone: nn.Module, weights: Weights) -> None:
    """Give the backbone's adapter these weights, all of them.

    Raises:
        BundleError: one has no place there, or a place is left over.
    """
    set_peft_model_state_dict(backbone, dict(weights))
    filled = get_peft_model_state_dict(backbone, save_embedding_layers=False)
    both = weights.keys() & filled.keys()
    lost = [name for name in both if not torch.equal(weights[name], filled[name].cpu().to(weights[name]))]
    if wrong := sorted({*lost, *(weights.keys() ^ filled.keys())}):
        raise BundleError(
            f"{len(wrong)} averaged weights did not arrive in the model, {wrong[0]} first",
            remedy="use the versions of peft and transformers in the bundles' bundle.json",
        )


def load_whole(bundle: Bundle, new: Path, into: str, base: Path | None) -> tuple[Classifier, Config]:
    """A bundle's classifier over weights that are not quantised, to be written in `into`; and its config.

    It lies on the CPU, which has the memory. `new`: where it will be written; the disk is looked at.

    Raises:
        BundleError: the disk is too small.
        ModelError: the base can't be found.
    """
    config = bundle.config if base is None else _with_model(bundle.config, base=str(base))
    source = resolve_base(config.model.base, base) if config.model.lora else str(bundle.folder / "backbone")
    held = _held(source, config, new, into)
    config = override(config, ["model.quantization=none", f"model.dtype={held}"])
    return Bundle(bundle.folder, bundle.manifest, config).load(torch.device("cpu"), base), config


def without_adapter(classifier: Classifier, dtype: torch.dtype) -> Classifier:
    """The classifier without adapters, its weights W + BA in `dtype`; without any, its weights in `dtype`.

    peft adds a float32 BA in place, which torch computes in float32 and rounds once. Its `safe_merge` would round BA
    before, and lose most of what is small beside W.
    """
    backbone = classifier.backbone
    if isinstance(backbone, PeftModel):
        backbone = backbone.merge_and_unload()
    return Classifier(backbone.to(dtype), classifier.head, dtype, classifier.pooling)


def _held(source: str, config: Config, new: Path, into: str) -> str:
    """The dtype to load the base in: the one to write if its files have it, else float32, so as to round once.

    Raises:
        BundleError: the disk is too small.
        ModelError: the base can't be found.
    """
    settings = read_settings(source)
    weights = sum(one.numel() for one in empty_model(settings).parameters())
    wanted: torch.dtype = getattr(torch, into)
    held = wanted if getattr(settings, "dtype", None) == wanted else torch.float32
    name = str(held).removeprefix("torch.")
    need, free = weights * wanted.itemsize, shutil.disk_usage(new).free
    console.print(
        f"{weights:,} weights: {_gib(weights * held.itemsize)} of memory to merge in ({name}), {_gib(need)} of disk to "
        f"write ({into}), and as much on {pick_device()} to score"
    )
    if need > free:
        raise BundleError(
            f"merging into {into} writes {_gib(need)}, and {_gib(free)} are free where --out is",
            remedy="free some disk, or give another --out",
        )
    return name


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
