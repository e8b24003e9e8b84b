"""Merge: average the adapters of several folds, or merge an adapter into unquantised weights.

The result differs from the validated model. So it is read back from disk and scored on held-out rows; if its log loss
moved by more than `max_shift`, it is discarded.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pairclf.approaches.finetune.drift import (
    HeldOutSample,
    compare,
    logits_of,
    reference,
    render,
    require_within,
    sample_probabilities,
    sample_rows,
)
from pairclf.bundles.bundle import Bundle, open_bundle, write_bundle
from pairclf.bundles.contents import MANIFEST
from pairclf.bundles.manifest import Probe, amend, mean_thresholds, read_manifest
from pairclf.bundles.probes import pick_probes
from pairclf.config import Config, Lora, override
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError
from pairclf.files import atomic_folder
from pairclf.model.backbone import add_adapters, empty_model, load_tokenizer, name_of, pick_device, read_settings
from pairclf.model.device_memory import free_memory
from pairclf.model.engine import Classifier
from pairclf.model.scoring import by_order
from pairclf.model.weights import fill_adapter, load_classifier, save_weights
from pairclf.run import bundles_of, output_of, refuse_mixed_bundles
from pairclf.scores.metrics import Floats

Average = Literal["exact", "factors"]
Into = Literal["bfloat16", "float16", "float32"]
Weights = Mapping[str, Tensor]


class MergeSource(NamedTuple):
    """A bundle to be merged, with adapter and head on the CPU."""

    bundle: Bundle
    adapter: Weights
    head: Weights


def merge(
    config: Config,
    out: Path,
    *,
    max_shift: float,
    folds: Sequence[int] = (),
    average: Average = "exact",
    into: Into | None = None,
    rows: int | None = None,
    base: Path | None = None,
) -> Path:
    """Merge bundles of a run into the bundle `out`, unless its log loss moves too far.

    Args:
        config: of the run.
        out: folder of the new bundle; an older one of the same bundles is replaced.
        max_shift: largest move of the log loss, in nats a row; see `require_within`.
        folds: folds whose bundles are merged; empty: all of the run.
        average: how several adapters are averaged: exact, the mean of their products BA; factors, the products of
            the means of B and of A.
        into: dtype of the whole weights to write; None: an adapter is written.
        rows: number of rows to score, sampled with `config.seed`; None: all.
        base: folder of the base model on this machine.

    Raises:
        ConfigError: there is nothing to merge, or `out` is one of the sources.
        BundleError: the bundles are incompatible, the disk is too small, or the log loss moved too far.
        DataError: the out-of-fold scores belong to other bundles or other rows.
    """
    config.require("model", "merge")
    parts = open_parts(config, folds, out, into)
    bundles = [part.bundle for part in parts]
    name = "-".join([*output_of(config).parts[-1:], *(part.bundle.folder.parent.name for part in parts), "merged"])
    refuse_other_bundle(out, name)
    sample = sample_rows(config, bundles, rows)
    with atomic_folder(out, known_by=MANIFEST) as new:
        factor_error = _build(parts, new, name, average=average, into=into, base=base)
        free_memory()
        logits = logits_of(open_bundle(new), [sample.items], base)[0]
        after = sample_probabilities(bundles[0], sample, logits)
        before = reference(bundles, sample, base)
        drift = compare(
            sample, before, after, config.task, num_bundles=len(parts), operation="merged", factor_error=factor_error
        )
        console.print(render(drift, config.task))
        require_within(drift, max_shift, out)
        amend(new, metrics=drift.metrics, probes=_probes(sample, logits))
    console.print(f"saved {out}, scored as it was read back: log loss moved by {drift.change:+.5f}")
    return out


def _probes(sample: HeldOutSample, logits: Floats) -> list[Probe]:
    return pick_probes(sample.rows, by_order(sample.items, logits, len(sample.rows)))


# --- the parts -------------------------------------------------------------------------------------------------------


def open_parts(config: Config, folds: Sequence[int], out: Path, into: str | None) -> list[MergeSource]:
    """Open the bundles of `folds` (empty: all folds), which must be compatible.

    Raises:
        ConfigError: as `bundles_of`, `check_target` and `refuse_mixed_bundles`; one bundle and no `into`.
        BundleError: a bundle was changed, has no adapter, or is incompatible with the others.
    """
    folders = bundles_of(config, folds)
    check_target(folders, out)
    if len(folders) == 1 and into is None:
        raise ConfigError(
            f"{folders[0]} is a single bundle, and no --into is given: there is nothing to merge",
            remedy="give --into bfloat16 to merge the adapter into the weights, or several folds to average",
        )
    bundles = [open_bundle(folder) for folder in folders]
    refuse_mixed_bundles(bundles)
    check_alike(bundles)
    return [
        MergeSource(bundle, load_file(bundle.files.adapter_weights), load_file(bundle.files.head)) for bundle in bundles
    ]


def check_target(folders: Sequence[Path], out: Path) -> None:
    """Check that `out` is not one of the bundles' folders that are read, or inside one.

    Raises:
        ConfigError: a folder would be overwritten.
    """
    if overwritten := [folder for folder in folders if folder.resolve() in (out.resolve(), *out.resolve().parents)]:
        raise ConfigError(f"--out {out} would overwrite {overwritten[0]}, which is read", remedy="give a new folder")


def refuse_other_bundle(out: Path, name: str) -> None:
    """Refuse to replace a bundle in `out` that is not an earlier result of the same merge or export.

    Raises:
        ConfigError: the bundle in `out` has another name.
    """
    if (out / MANIFEST).is_file() and (there := read_manifest(out).name) != name:
        raise ConfigError(
            f"--out {out} holds the bundle {there}, and {name} would replace it", remedy="give another folder"
        )


def check_alike(bundles: Sequence[Bundle]) -> None:
    """Check that the bundles have compatible adapters for the same base, task and recipe.

    Raises:
        BundleError: names the differences, or why the adapters can't be averaged.
    """
    first, several = bundles[0], len(bundles) > 1
    for bundle in bundles:
        lora = bundle.config.model.lora
        if bundle.manifest.weights != "adapter" or lora is None:
            raise BundleError(f"bundle {bundle.name} holds no adapter: there is nothing to merge", where=bundle.folder)
        if several and lora.use_dora:
            raise BundleError(
                "adapters with DoRA can't be averaged: each has magnitudes that fit its own direction, not the mean",
                where=bundle.folder,
                remedy="merge one fold with --fold N --into DTYPE, or predict with all bundles",
            )
    expected = _comparable_settings(first)
    for other in bundles[1:]:
        actual = _comparable_settings(other)
        if differing := [name for name in expected if expected[name] != actual[name]]:
            differences = ", ".join(_difference(name, expected[name], actual[name]) for name in differing)
            raise BundleError(
                f"bundles {first.name} and {other.name} differ in {differences}; their weights can't be averaged",
                where=other.folder,
                remedy="choose folds with the same settings by --fold, or train them again",
            )


def _comparable_settings(bundle: Bundle) -> dict[str, object]:
    """Settings that must be equal for weights to be averaged and scores to be compared."""
    model, inputs = bundle.config.model, bundle.config.inputs.model_dump(exclude={"num_proc"})
    lora = {} if model.lora is None else model.lora.model_dump(exclude={"lora_dropout"})
    return {
        "task": bundle.config.task,
        "base model": bundle.manifest.base_fingerprint,
        "tokenizer": bundle.manifest.files.get("tokenizer/tokenizer.json"),
        **{f"inputs.{name}": value for name, value in inputs.items()},
        **{
            f"model.{name}": getattr(model, name)
            for name in ("quantization", "readout", "label_words", "label_scoring", "tie_model", "head", "pooling")
        },
        **{f"model.lora.{name}": value for name, value in lora.items()},
        "predict.temperature": bundle.config.predict.temperature,
    }


def _difference(name: str, left: object, right: object) -> str:
    short = isinstance(left, str | int | float) and len(f"{left}{right}") <= 60
    return f"{name} ({left} and {right})" if short else name


# --- the weights -----------------------------------------------------------------------------------------------------


def mean_of_factors(parts: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of each tensor: of A and of B for an adapter (LMSYS 1), of weight and bias for a head."""
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}


def mean_of_products(parts: Sequence[Weights], lora: Lora) -> dict[str, Tensor]:
    """The exact mean of the products BA as one adapter: A's `(r, in)` stacked, B's `(out, r)` joined, rank `n * r`.

    peft scales by alpha / rank, which is now 1/n of the original: the sum of the products becomes their mean. With
    rsLoRA the scale is alpha / sqrt(rank), so B takes the remaining 1 / sqrt(n).
    """
    rest = len(parts) ** -0.5 if lora.use_rslora else 1.0
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        joined[name] = torch.cat(tensors) if _is_a(name) else torch.cat(tensors, dim=1) * rest
    return joined


def _is_a(name: str) -> bool:
    """`...q_proj.lora_A.weight`; all others are `...q_proj.lora_B.weight`, as DoRA adapters are refused."""
    return ".lora_A." in name


def error_of_factors(parts: Sequence[Weights]) -> float:
    """Relative error of `mean_of_factors`: norm of its difference from the mean of the products / norm of that mean.

    Frobenius norms over all modules, from Gram matrices: no product BA of the size of a weight is computed.
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
    """`|BA|^2 = trace(B'B AA')`, clamped at 0 against rounding."""
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def _build(
    parts: Sequence[MergeSource], new: Path, name: str, *, average: str, into: str | None, base: Path | None
) -> float | None:
    """Write the merged bundle, without scores, into the empty folder `new`.

    Returns:
        Relative error of the mean of factors, if that was taken; else None.
    """
    first, factor_error = parts[0].bundle, None
    if into is None:  # an adapter is written over its (quantised) base
        config = first.config if base is None else _with_model(first.config, base=str(base))
        classifier = load_classifier(first, pick_device(), base)
    else:
        classifier, config = load_whole(first, new, into, base)
    if len(parts) > 1:
        lora, factor_error = _average(classifier, parts, average)
        config = _with_model(config, lora=lora)
    if into is not None:
        config = override(config, ["model.lora=null", f"model.dtype={into}"])
        classifier = without_adapter(classifier, getattr(torch, into))
    tokenizer = load_tokenizer(str(first.files.tokenizer))
    fold = first.manifest.fold if len(parts) == 1 else None
    seen = [part.bundle.trained_on() for part in parts]
    prompts = [table for table in seen if table is not None]
    trained_on = pl.concat(prompts, how="diagonal") if len(prompts) == len(seen) else None
    prior = np.mean([part.bundle.manifest.prior for part in parts], axis=0).tolist()
    write_bundle(
        new,
        config,
        save_weights(new, classifier, config, tokenizer),
        name=name,
        fold=fold,
        metrics={},
        prior=prior,
        probes=[],
        thresholds=mean_thresholds([part.bundle.manifest for part in parts]),
        trained_on=trained_on,
    )
    return factor_error


def _with_model(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _average(classifier: Classifier, parts: Sequence[MergeSource], average: str) -> tuple[Lora, float | None]:
    """Replace the adapter and head by the mean of the sources; returns the error of the mean of factors, or None."""
    lora = parts[0].bundle.config.model.lora
    assert lora is not None  # `check_alike`
    adapters = [part.adapter for part in parts]
    if average == "exact":
        mean, factor_error = mean_of_products(adapters, lora), None
        lora = lora.model_copy(update={"r": len(parts) * lora.r})
    else:
        mean, factor_error = mean_of_factors(adapters), error_of_factors(adapters)
    classifier.backbone = add_adapters(classifier.backbone.unload(), lora)  # type: ignore[operator]
    fill_adapter(classifier.backbone, mean)
    classifier.head.load_state_dict(mean_of_factors([part.head for part in parts]), strict=True)
    return lora, factor_error


def load_whole(bundle: Bundle, new: Path, into: str, base: Path | None) -> tuple[Classifier, Config]:
    """Load a bundle's classifier over unquantised weights, to be written as dtype `into`; returns it and its config.

    It is loaded on the CPU, which has more memory. `new`: the target folder, whose disk space is checked.

    Raises:
        BundleError: the disk is too small.
        ModelError: the base can't be found.
    """
    config = bundle.config if base is None else _with_model(bundle.config, base=str(base))
    loading_dtype = _loading_dtype(bundle.weights_source(base), config, new, into)
    config = override(config, ["model.quantization=none", f"model.dtype={loading_dtype}"])
    return load_classifier(replace(bundle, config=config), torch.device("cpu"), base), config


def without_adapter(classifier: Classifier, dtype: torch.dtype) -> Classifier:
    """Merge the adapter: weights W + BA in `dtype`. Without an adapter, the weights are cast to `dtype`.

    peft adds a float32 BA in place, which torch computes in float32 and rounds once. Its `safe_merge` would round BA
    first, and lose most of it where it is small compared to W.
    """
    backbone = classifier.backbone
    if isinstance(backbone, PeftModel):
        backbone = backbone.merge_and_unload()
    return Classifier(backbone.to(dtype), classifier.head, dtype, classifier.pooling)


def _loading_dtype(source: str, config: Config, new: Path, into: str) -> str:
    """The dtype to load the base in: the target dtype if its files have it, else float32, so that it is rounded once.

    Raises:
        BundleError: the disk is too small.
        ModelError: the base can't be found.
    """
    settings = read_settings(source, config.model.pooling)
    weights = sum(weight.numel() for weight in empty_model(settings).parameters())
    target: torch.dtype = getattr(torch, into)
    loaded = target if getattr(settings, "dtype", None) == target else torch.float32
    name = name_of(loaded)
    need, free = weights * target.itemsize, shutil.disk_usage(new).free
    console.print(
        f"merging {weights:,} weights takes {_gib(weights * loaded.itemsize)} of memory ({name}), {_gib(need)} of disk "
        f"({into}), and as much memory on {pick_device()} for scoring"
    )
    if need > free:
        raise BundleError(
            f"merging into {into} writes {_gib(need)}, and {_gib(free)} are free where --out is",
            remedy="free some disk, or give another --out",
        )
    return name


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
