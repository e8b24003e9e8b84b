"""Export a bundle as a model without adapters, for inference: full weights in a dtype, or quantised. No base is needed.

The export is read back and scored on the source's probe rows and on held-out rows; if its log loss moved by more than
`max_shift`, it is discarded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from pairclf.approaches.finetune.drift import (
    HeldOutSample,
    compare,
    logits_of,
    reference,
    render,
    require_within,
    sample_probabilities,
    sample_rows,
    sample_unseen_rows,
)
from pairclf.approaches.finetune.merge import check_target, load_whole, refuse_other_bundle, without_adapter
from pairclf.bundles.bundle import Bundle, open_bundle, write_bundle
from pairclf.bundles.contents import MANIFEST, BundleFiles
from pairclf.bundles.inputs import builder_of
from pairclf.bundles.manifest import Probe, amend
from pairclf.config import Config, Model, override
from pairclf.console import console, counted
from pairclf.errors import BundleError, ConfigError, ModelError
from pairclf.files import atomic_folder
from pairclf.inputs.sequences import Item, branches_of
from pairclf.model.backbone import load_base, load_tokenizer, pick_device, stored_weights
from pairclf.model.device_memory import free_memory
from pairclf.model.inputs import encoded_rows
from pairclf.model.scoring import items_of
from pairclf.model.weights import save_weights
from pairclf.run import Paths, bundles_of, labelled_rows, output_of
from pairclf.trust import granted

To = Literal["bfloat16", "float16", "float32", "int8", "gptq", "awq"]

NEEDS = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}
"""Packages needed to write and read a format; int8 needs bitsandbytes, which is always installed."""

CALIBRATION_ROWS = 128
"""Calibration rows of GPTQ and AWQ: as many as in the papers (arXiv 2210.17323, 2306.00978)."""

GPTQ_BITS, AWQ_BITS, GROUP = 8, 4, 128
"""GPTQ with 8 bits, like LMSYS' winner; AWQ supports only 4. One scale for 128 weights."""

Quantise = Callable[[Path, Path, Model, Sequence[list[int]]], None]


def export(
    config: Config,
    out: Path,
    *,
    to: To,
    fold: int | None = None,
    bundle: Path | None = None,
    max_shift: float = 0.01,
    rows: int | None = None,
    base: Path | None = None,
) -> Path:
    """Write a bundle of a run as the bundle `out` without adapters, unless its log loss moves too far.

    Args:
        config: of the run.
        out: folder of the new bundle; an older one of the same bundle is replaced.
        to: a dtype for full weights; int8 (bitsandbytes), gptq (8 bits) or awq (4 bits) for quantised weights.
        fold: fold of the bundle; None: the run's only bundle.
        bundle: another bundle than the run's, e.g. a merged one.
        max_shift: largest change of the log loss in either direction, in nats a row.
        rows: number of rows to score, sampled with `config.seed`; None: all held-out rows.
        base: folder of the base model on this machine.

    Raises:
        ConfigError: the bundle does not exist or is ambiguous, or `out` would overwrite it.
        ModelError: the format needs a package that is not installed, or the model can't be quantised.
        BundleError: the source is quantised already, the disk is too small, or the log loss moved too far.
        DataError: the out-of-fold scores belong to another bundle or other rows.
    """
    config.require("model", "export")
    _check_installed(to)
    source = source_bundle(config, fold, bundle, out)
    refuse_other_bundle(out, f"{source.name}-{to}")
    of_run = source.folder == Paths(output_of(config), source.manifest.fold).bundle
    sample = sample_rows(config, [source], rows) if of_run else sample_unseen_rows(config, source, rows)
    with atomic_folder(out, known_by=MANIFEST) as new:
        _build(source, new, to, _calibration(config, source, sample) if to in NEEDS else [], base)
        free_memory()
        probed = items_of(builder_of(source).encode([probe.row() for probe in source.manifest.probes]), orders=2)
        logits, of_probes = logits_of(open_bundle(new), [sample.items, probed], None)
        after, task = sample_probabilities(source, sample, logits), config.task
        drift = compare(sample, reference([source], sample, base), after, task, num_bundles=1, operation="exported")
        probes = _with_logits(source.manifest.probes, probed, of_probes)
        change = _largest_change(source.manifest.probes, probes)
        size, size_before = (
            sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in (new, source.folder)
        )
        console.print(render(drift, task))
        console.print(f"largest change of a logit on {counted(len(probes), 'probe row')}: {change:.4f}")
        require_within(drift, max_shift, out)
        amend(
            new, metrics=drift.metrics | {"exported_probe_change": change, "exported_bytes": float(size)}, probes=probes
        )
    console.print(
        f"saved {out}, scored as it was read back: log loss moved by {drift.change:+.5f}; {_mib(size)} of weights"
        f" ({_mib(size_before)} before{', and its base' if source.manifest.needs_base else ''})"
    )
    return out


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _check_installed(to: str) -> None:
    """Fail early if a format's packages can't be imported."""
    for package in NEEDS.get(to, ()):
        try:
            import_module(package)
        except ImportError as error:
            raise ModelError(
                f"--to {to} needs the package {package}, which can't be imported: {error}",
                remedy=f"pip install {' '.join(NEEDS[to])}, on this machine and where it will predict; or --to int8",
            ) from error


def source_bundle(config: Config, fold: int | None, bundle: Path | None, out: Path) -> Bundle:
    """The bundle to export, which must have an adapter or unquantised weights."""
    if bundle is not None and fold is not None:
        raise ConfigError(f"--bundle {bundle} and --fold {fold} name two bundles", remedy="give only one of them")
    folders = [bundle] if bundle is not None else bundles_of(config, [] if fold is None else [fold])
    check_target(folders, out)
    if len(folders) > 1:
        raise ConfigError(
            f"the run has {len(folders)} bundles, and export takes one",
            remedy="give --fold N; or `pairclf merge` them first, and give --bundle",
        )
    source = open_bundle(folders[0])
    source.config.require("model", "export")
    if source.config.task != config.task:
        raise BundleError(f"bundle {source.name} is of another task than the config", where=source.folder)
    if source.manifest.weights == "base":
        raise BundleError(
            f"bundle {source.name} holds no weights: nothing was trained, and {source.manifest.base} is as it was",
            where=source.folder,
            remedy="predict with the bundle itself",
        )
    if source.manifest.weights == "whole" and (how := stored_weights(source.files.backbone)):
        raise BundleError(
            f"bundle {source.name} holds {how} weights: exporting them would round them twice",
            where=source.folder,
            remedy="export the bundle from which it was made",
        )
    return source


def _calibration(config: Config, source: Bundle, sample: HeldOutSample) -> list[list[int]]:
    """Token ids of calibration rows in order AB, disjoint from the rows on which the export is scored."""
    frame = labelled_rows(config)
    others = frame.filter(~pl.col("id").is_in([row.id for row in sample.rows]))
    others = frame if others.is_empty() else others
    count = min(CALIBRATION_ROWS, len(others))
    chosen = others[np.sort(np.random.default_rng(config.seed).choice(len(others), count, replace=False)).tolist()]
    encoded = encoded_rows(config, builder_of(source), frame)
    items = items_of(encoded.of(chosen["id"]), orders=1)
    return [branch.tolist() for item in items for branch in branches_of(item.ids)]


def _build(source: Bundle, new: Path, to: str, calibration: Sequence[list[int]], base: Path | None) -> None:
    """Write the bundle, without scores, into the empty folder `new`."""
    quantise = QUANTISERS.get(to)
    # Quantised formats start from float16: a T4 computes in it, and int8 kernels do everywhere.
    into = to if quantise is None else "float16"
    classifier, config = load_whole(source, new, into, base)
    classifier = without_adapter(classifier, getattr(torch, into))
    dtype = source.config.model.dtype if quantise else into
    config = override(config, ["model.lora=null", f"model.dtype={dtype}"])
    tokenizer = load_tokenizer(str(source.files.tokenizer))
    if quantise is not None:
        whole = new / "whole"
        classifier.backbone.save_pretrained(whole)  # type: ignore[operator]
        tokenizer.save_pretrained(whole)
        classifier.backbone = torch.nn.Identity()  # frees the memory for the quantised one
        free_memory()
        quantise(whole, BundleFiles(new).backbone, config.model, calibration)
        shutil.rmtree(whole)
    write_bundle(
        new,
        config,
        save_weights(new, classifier, config, tokenizer, fingerprint=source.manifest.base_fingerprint),
        name=f"{source.name}-{to}",
        fold=source.manifest.fold,
        metrics={},
        prior=source.manifest.prior,
        probes=[],
        thresholds=source.manifest.thresholds,
        trained_on=source.trained_on(),
    )


def _int8(whole: Path, out: Path, model: Model, _: Sequence[list[int]]) -> None:
    """LLM.int8 (arXiv 2208.07339): rounded once, here; loading it does not round again."""
    frozen = model.model_copy(update={"quantization": "int8", "lora": None})
    backbone: Any = load_base(str(whole), frozen, torch.float16, pick_device())
    backbone.save_pretrained(out)


def _gptqmodel(whole: Path, out: Path, model: Model, calibration: Sequence[list[int]], **settings: Any) -> None:
    gptqmodel = import_module("gptqmodel")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
    # No offloading to disk: config.json would then contain a path of this machine.
    quantize_config = gptqmodel.QuantizeConfig(group_size=GROUP, offload_to_disk=False, **settings)
    try:
        # The default would be bfloat16 where the device supports it.
        options = {"dtype": torch.float16, "trust_remote_code": granted().remote_code}
        quantiser = gptqmodel.GPTQModel.load(str(whole), quantize_config, **options)
        quantiser.quantize(rows, batch_size=1)
        quantiser.save(str(out))
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"gptqmodel can't quantise this model: {' '.join(str(error).split())[:300]}", remedy="use --to int8"
        ) from error


def _gptq(whole: Path, out: Path, model: Model, calibration: Sequence[list[int]]) -> None:
    _gptqmodel(whole, out, model, calibration, bits=GPTQ_BITS)


def _awq(whole: Path, out: Path, model: Model, calibration: Sequence[list[int]]) -> None:
    _gptqmodel(whole, out, model, calibration, bits=AWQ_BITS, method="awq", format="gemm")


QUANTISERS: dict[str, Quantise] = {"int8": _int8, "gptq": _gptq, "awq": _awq}
"""Functions of a float16 model's folder, the target folder, settings, and token ids for calibration."""


def _with_logits(probes: Sequence[Probe], items: Sequence[Item], logits: np.ndarray[Any, Any]) -> list[Probe]:
    """The same probe rows with new logits `(M, C)`, scored in one batch as in `verify`."""
    by_sequence: dict[tuple[int, int], list[float]] = {
        (item.row, item.order): values.tolist() for item, values in zip(items, logits, strict=True)
    }
    return [
        Probe(probe.id, probe.fields, [by_sequence[row, order] for order in range(len(probe.logits))])
        for row, probe in enumerate(probes)
    ]


def _largest_change(before: Sequence[Probe], after: Sequence[Probe]) -> float:
    pairs = zip(before, after, strict=True)
    return max((float(np.abs(np.subtract(old.logits, new.logits)).max()) for old, new in pairs), default=0.0)
