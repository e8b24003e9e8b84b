"""One bundle as a model without adapters, for inference: whole weights in a dtype, or quantised.

What is written is read back and scored, on the source's probe rows and on rows that were held out; where its log loss
moved more than is allowed, nothing of it is kept. It needs no base model.
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

from pairclf.config import Config, Model, override
from pairclf.console import console
from pairclf.errors import BundleError, ConfigError, ModelError
from pairclf.files import atomic_folder
from pairclf.jobs.fit import free_memory
from pairclf.jobs.inputs import encoded_rows
from pairclf.jobs.merge import check_choice, check_folders, load_whole, without_adapter
from pairclf.jobs.proof import Sample, compare, draw, draw_unseen, judge, logits_of, probabilities_of, reference, render
from pairclf.jobs.run import Paths, bundles_of, labelled_rows, output_of
from pairclf.jobs.scoring import items_of
from pairclf.model.backbone import load_base, load_tokenizer, pick_device, stored_weights
from pairclf.model.batch import Item
from pairclf.model.bundle import MANIFEST, Bundle, Probe, amend, open_bundle, write
from pairclf.trust import granted

To = Literal["bfloat16", "float16", "float32", "int8", "gptq", "awq"]

NEEDS = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}
"""What must be installed to write the format and to read it; bitsandbytes, which int8 needs, always is."""

CALIBRATION_ROWS = 128
"""Rows whose activations tell GPTQ and AWQ what to keep: as many as in the papers (arXiv 2210.17323, 2306.00978)."""

GPTQ_BITS, AWQ_BITS, GROUP = 8, 4, 128
"""GPTQ with 8 bits, as LMSYS' winner; AWQ knows 4 alone. A scale for every 128 weights."""

Quantise = Callable[[Path, Path, Model, Sequence[list[int]]], None]


def export(
    config: Config,
    out: Path,
    *,
    to: str,
    fold: int | None = None,
    bundle: Path | None = None,
    max_shift: float = 0.01,
    rows: int | None = None,
    base: Path | None = None,
) -> Path:
    """Write a bundle of a run as the bundle `out` without adapters, unless its log loss moves too far.

    Args:
        config: of the run.
        out: folder of the new bundle; an older bundle there is replaced.
        to: a dtype for whole weights; int8 (bitsandbytes), gptq (8 bits) or awq (4 bits) for quantised ones.
        fold: whose bundle; None: the run's only one.
        bundle: a bundle in place of the run's, e.g. a merged one.
        max_shift: largest move of the log loss up or down, in nats a row.
        rows: score so many rows, drawn by `config.seed`; None: all that were held out.
        base: folder of the base model on this machine.

    Raises:
        ConfigError: there is no such bundle, several, or `out` is it.
        ModelError: the format needs a package that is not installed, or the model can't be quantised.
        BundleError: the source is quantised already, the disk is too small, or the log loss moved too far.
        DataError: the out-of-fold scores are not those of the bundle, or not of these rows.
    """
    check_choice("to", to, To)
    _check_installed(to)
    source = _source(config, fold, bundle, out)
    of_run = source.folder == Paths(output_of(config), source.manifest.fold).bundle
    sample = draw(config, [source], rows) if of_run else draw_unseen(config, source, rows)
    with atomic_folder(out, known_by=MANIFEST) as new:
        _build(source, new, to, _calibration(config, source, sample) if to in NEEDS else [], base)
        free_memory()
        probed = items_of(source.builder().encode([probe.row() for probe in source.manifest.probes]), orders=2)
        logits, of_probes = logits_of(open_bundle(new), [sample.items, probed], None)
        after, task = probabilities_of(source, sample, logits), config.task
        shift = compare(sample, reference([source], sample, base), after, task, parts=1, done="exported")
        probes = _with_logits(source.manifest.probes, probed, of_probes)
        change = _largest_change(source.manifest.probes, probes)
        size, was = (
            sum(one.stat().st_size for one in folder.rglob("*.safetensors")) for folder in (new, source.folder)
        )
        console.print(render(shift, task))
        console.print(f"largest change of a logit on {len(probes)} probe rows: {change:.4f}")
        judge(shift, max_shift, out)
        amend(
            new, metrics=shift.metrics | {"exported_probe_change": change, "exported_bytes": float(size)}, probes=probes
        )
    console.print(
        f"saved {out}, scored as it was read back: log loss moved by {shift.moved:+.5f}; {_mib(size)} of weights"
        f" ({_mib(was)} before{', and its base' if source.config.model.lora else ''})"
    )
    return out


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _check_installed(to: str) -> None:
    """Refuse a format whose packages don't import, before any work."""
    for package in NEEDS.get(to, ()):
        try:
            import_module(package)
        except ImportError as error:
            raise ModelError(
                f"--to {to} needs the package {package}, which can't be imported: {error}",
                remedy=f"pip install {' '.join(NEEDS[to])}, here and where it is to predict; or --to int8",
            ) from error


def _source(config: Config, fold: int | None, bundle: Path | None, out: Path) -> Bundle:
    """The bundle to export, which must hold weights that were not quantised yet, or an adapter."""
    if bundle is not None and fold is not None:
        raise ConfigError(f"--bundle {bundle} and --fold {fold} name two bundles", remedy="leave one of them away")
    given = [bundle] if bundle is not None else [] if fold is None else [Paths(output_of(config), fold).bundle]
    folders = given or bundles_of(config)
    check_folders(folders, out)
    if len(folders) > 1:
        raise ConfigError(
            f"the run has {len(folders)} bundles, and one is exported",
            remedy="give --fold N; or `pairclf merge` them first, and give --bundle",
        )
    source = open_bundle(folders[0])
    if source.config.task != config.task:
        raise BundleError(f"bundle {source.name} is of another task than the config", where=source.folder)
    if source.config.model.lora is None and (how := stored_weights(source.folder / "backbone")):
        raise BundleError(
            f"bundle {source.name} holds {how} weights: exported again, they would be rounded twice",
            where=source.folder,
            remedy="export the bundle that it was made of",
        )
    return source


def _calibration(config: Config, source: Bundle, sample: Sample) -> list[list[int]]:
    """Rows as the model sees them, in their own order of answers, none of which the result will be judged by."""
    frame = labelled_rows(config)
    others = frame.filter(~pl.col("id").is_in([row.id for row in sample.rows]))
    others = frame if others.is_empty() else others
    count = min(CALIBRATION_ROWS, len(others))
    chosen = others[np.sort(np.random.default_rng(config.seed).choice(len(others), count, replace=False)).tolist()]
    encoded = encoded_rows(config, source.builder(), frame)
    return [item.ids.tolist() for item in items_of(encoded.of(chosen["id"]), orders=1)]


def _build(source: Bundle, new: Path, to: str, calibration: Sequence[list[int]], base: Path | None) -> None:
    """Write the bundle, not yet scored, into the empty folder `new`."""
    quantise = QUANTISERS.get(to)
    # Before it is quantised it is rounded to float16, as a T4 computes in it, and int8's own kernels do everywhere.
    into = to if quantise is None else "float16"
    classifier, config = load_whole(source, new, into, base)
    classifier = without_adapter(classifier, getattr(torch, into))
    dtype = source.config.model.dtype if quantise else into
    config = override(config, ["model.lora=null", f"model.dtype={dtype}"])
    tokenizer = load_tokenizer(str(source.folder / "tokenizer"))
    if quantise is not None:
        whole = new / "whole"
        classifier.backbone.save_pretrained(whole)  # type: ignore[operator]
        tokenizer.save_pretrained(whole)
        classifier.backbone = torch.nn.Identity()  # the memory is needed for the next one
        free_memory()
        quantise(whole, new / "backbone", config.model, calibration)
        shutil.rmtree(whole)
    write(
        new,
        classifier,
        config,
        tokenizer,
        name=f"{source.name}-{to}",
        fold=source.manifest.fold,
        metrics={},
        prior=source.manifest.prior,
        probes=[],
        trained_on=source.trained_on(),
        stands_on=source.manifest.base_fingerprint,
    )


def _int8(whole: Path, out: Path, model: Model, _: Sequence[list[int]]) -> None:
    """LLM.int8 (arXiv 2208.07339): rounded here, once, and stored so; loading it does not round again."""
    frozen = model.model_copy(update={"quantization": "int8", "lora": None})
    backbone: Any = load_base(str(whole), frozen, torch.float16, pick_device())
    backbone.save_pretrained(out)


def _gptqmodel(whole: Path, out: Path, model: Model, calibration: Sequence[list[int]], **settings: Any) -> None:
    gptqmodel = import_module("gptqmodel")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
    # Nothing is moved to disk: its config.json would name this machine's temporary folder.
    wanted = gptqmodel.QuantizeConfig(group_size=GROUP, offload_to_disk=False, **settings)
    try:
        # By itself it would choose bfloat16 where a GPU, or a CPU, has it.
        options = {"dtype": torch.float16, "trust_remote_code": granted().remote_code}
        quantiser = gptqmodel.GPTQModel.load(str(whole), wanted, **options)
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
"""Folder of a float16 model, folder to write, settings, token ids of rows -> the model's files."""


def _with_logits(probes: Sequence[Probe], items: Sequence[Item], logits: np.ndarray[Any, Any]) -> list[Probe]:
    """The same rows with other logits `(M, C)`, scored in one batch as `verify` does."""
    found: dict[tuple[int, int], list[float]] = {
        (item.row, item.order): values.tolist() for item, values in zip(items, logits, strict=True)
    }
    return [
        Probe(probe.id, probe.fields, [found[row, order] for order in range(len(probe.logits))])
        for row, probe in enumerate(probes)
    ]


def _largest_change(before: Sequence[Probe], after: Sequence[Probe]) -> float:
    pairs = zip(before, after, strict=True)
    return max((float(np.abs(np.subtract(one.logits, other.logits)).max()) for one, other in pairs), default=0.0)
