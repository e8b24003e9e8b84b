"""After training: several folds' adapters averaged into one, or an adapter merged into weights that are not quantised.

Either makes another model than the one that was validated, so it is scored again, as it stands on disk, on rows that
were held out; where its log loss moved more than is allowed, nothing of it is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from pairclf.config import Config, Lora, override
from pairclf.console import console, table
from pairclf.data.tables import class_matrix, read_scores, to_rows
from pairclf.errors import BundleError, ConfigError, DataError, ModelError
from pairclf.files import atomic_folder
from pairclf.jobs.fit import free_memory, pick_probes
from pairclf.jobs.inputs import encoded_rows
from pairclf.jobs.run import OOF, Paths, bundles_of, labelled_rows, output_of
from pairclf.jobs.scoring import Floats, by_order, combine, items_of, probabilities, score
from pairclf.model.backbone import add_adapters, load_tokenizer, pick_device, resolve_base
from pairclf.model.batch import Item
from pairclf.model.bundle import MANIFEST, Bundle, Probe, amend, open_bundle, write
from pairclf.model.engine import Classifier
from pairclf.scores.metrics import accuracy, log_loss
from pairclf.task import AB, Row

Average = Literal["exact", "factors"]
Into = Literal["bfloat16", "float16", "float32"]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shift:
    """What the merge did to the scores of the same rows.

    Attributes:
        parts: bundles that were merged.
        rows: rows that were scored.
        reference: log loss of the bundle, or of the ensemble of the bundles: the mean of their probabilities.
        merged: log loss of the merged bundle.
        reference_accuracy, merged_accuracy: their accuracies.
        largest, mean: change of a probability, absolute.
        out_of_fold: log loss of the bundles' out-of-fold scores of these rows; no reference, see `render`.
        drift: norm of (mean of factors - mean of products) / norm of the mean of products; None where exact.
    """

    parts: int
    rows: int
    reference: float
    merged: float
    reference_accuracy: float
    merged_accuracy: float
    largest: float
    mean: float
    out_of_fold: float | None
    drift: float | None

    @property
    def moved(self) -> float:
        """Log loss, merged less reference; above 0 it became worse."""
        return self.merged - self.reference

    @property
    def metrics(self) -> dict[str, float]:
        """What the merged bundle's manifest says. None of it is named `log_loss`: it is not out of fold."""
        return {
            "merged_rows": float(self.rows),
            "merged_log_loss": self.merged,
            "merged_reference": self.reference,
            "merged_shift": self.moved,
            "merged_accuracy": self.merged_accuracy,
            "merged_largest_change": self.largest,
            "merged_mean_change": self.mean,
        }


class Part(NamedTuple):
    """A bundle to be merged, with its weights on the CPU."""

    bundle: Bundle
    adapter: Weights
    head: Weights


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows to score, in both orders; and where folds held them out, the scores `(N, C)` that they had then."""

    rows: Sequence[Row]
    items: list[Item]
    out_of_fold: Floats | None
    tokens_per_batch: int

    @property
    def targets(self) -> Floats:
        return np.array([row.target for row in self.rows], dtype=np.float64)


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
    _check_choice("average", average, Average)
    _check_choice("into", into or "bfloat16", Into)
    parts = open_parts(config, folds, out, into)
    sample = draw(config, parts, rows)
    name = "-".join([*output_of(config).parts[-1:], *(part.bundle.folder.parent.name for part in parts), "merged"])
    with atomic_folder(out, known_by=MANIFEST) as new:
        drift = _build(parts, new, name, average=average, into=into, base=base)
        free_memory()
        logits = _score(open_bundle(new), sample, base)
        after = _probabilities(parts[0].bundle, sample, logits)
        shift = measure(
            sample,
            _reference(parts, sample, base),
            after,
            parts=len(parts),
            drift=drift,
            several=config.task.multi_label,
        )
        console.print(render(shift))
        judge(shift, max_shift, out)
        amend(new, metrics=shift.metrics, probes=_probes(sample, logits))
    console.print(f"saved {out}, scored as it was read back: log loss moved by {shift.moved:+.5f}")
    return out


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"--{name} {value} is unknown", remedy=f"one of {', '.join(get_args(choices))}")


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
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"{missing[0]} does not exist", remedy="run `pairclf train CONFIG --fold N` first")
    if len(folders) == 1 and into is None:
        raise ConfigError(
            f"{folders[0]} is one bundle with its adapter, and nothing is to be done with it",
            remedy="give --into bfloat16 to merge the adapter into the weights, or several folds to average",
        )
    if spoilt := [folder for folder in folders if folder.resolve() in (out.resolve(), *out.resolve().parents)]:
        raise ConfigError(f"--out {out} would overwrite {spoilt[0]}, which is merged", remedy="give a new folder")
    bundles = [open_bundle(folder) for folder in folders]
    check_alike(bundles)
    return [Part(one, load_file(_adapter(one)), load_file(one.folder / "head.safetensors")) for one in bundles]


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
    config = first.config if base is None else _with_model(first.config, base=str(base))
    if into is not None:
        config = override(config, ["model.quantization=none", f"model.dtype={_held(config, new, into, base)}"])
    # Weights are merged on the CPU, which has the memory; adapters are filled where their quantised base can be.
    device = pick_device() if into is None else torch.device("cpu")
    classifier = Bundle(first.folder, first.manifest, config).load(device, base)
    if len(parts) > 1:
        lora, drift = _average(classifier, parts, average)
        config = _with_model(config, lora=lora)
    if into is not None:
        config = override(config, ["model.lora=null", f"model.dtype={into}"])
        classifier = _merged(classifier, getattr(torch, into))
    tokenizer = load_tokenizer(str(first.folder / "tokenizer"), config.model)
    fold = first.manifest.fold if len(parts) == 1 else None
    seen = [part.bundle.trained_on() for part in parts]
    known = [one for one in seen if one is not None]
    trained_on = pl.concat(known) if len(known) == len(seen) else None
    write(new, classifier, config, tokenizer, name=name, fold=fold, metrics={}, probes=[], trained_on=trained_on)
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


def _merged(classifier: Classifier, dtype: torch.dtype) -> Classifier:
    """The classifier without adapters, its weights W + BA in `dtype`.

    peft adds a float32 BA in place, which torch computes in float32 and rounds once. Its `safe_merge` would round BA
    before, and lose most of what is small beside W.
    """
    backbone: nn.Module = classifier.backbone.merge_and_unload()  # type: ignore[operator]
    return Classifier(backbone.to(dtype), classifier.head, dtype, classifier.pooling)


def _held(config: Config, new: Path, into: str, base: Path | None) -> str:
    """The dtype to load the base in: the one to write if its files have it, else float32, so as to round once.

    Raises:
        BundleError: the disk is too small.
        ModelError: the base can't be found.
    """
    source, trust = resolve_base(config.model.base, base), config.model.trust_remote_code
    try:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.base={config.model.base} can't be loaded: {error}", where=source) from error
    with torch.device("meta"):
        bare: nn.Module = AutoModel.from_config(settings, trust_remote_code=trust)  # type: ignore[no-untyped-call]
    weights = sum(one.numel() for one in bare.parameters())
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


# --- the proof -------------------------------------------------------------------------------------------------------


def draw(config: Config, parts: Sequence[Part], rows: int | None) -> Sample:
    """The rows that the parts' folds held out (for a bundle of all rows, those), or `rows` of them.

    Raises:
        DataError: a bundle's out-of-fold scores are missing, are not its own, or are of rows that are not there.
    """
    frame, task, known = labelled_rows(config), config.task, None
    encoded = encoded_rows(config, parts[0].bundle.builder(), frame)
    folds = [part.bundle for part in parts if part.bundle.manifest.fold is not None]
    if folds:
        known = pl.concat([_out_of_fold(one, frame) for one in folds])
        frame = frame.join(known.select("id"), on="id", how="semi", maintain_order="left")
    if rows is not None and rows < len(frame):
        chosen = np.random.default_rng(config.seed).choice(len(frame), rows, replace=False)
        frame = frame[np.sort(chosen).tolist()]
    scores = None if known is None else _aligned(frame, known, config)
    items = items_of(encoded.of(frame["id"]), orders=2)
    return Sample(to_rows(frame, task), items, scores, config.predict.tokens_per_batch)


def _aligned(frame: pl.DataFrame, scores: pl.DataFrame, config: Config) -> Floats:
    """The scores `(N, C)` of the frame's rows, in their order."""
    joined = frame.select("id").join(scores, on="id", how="left", maintain_order="left", validate="1:1")
    return class_matrix(joined, config.task)


def _out_of_fold(bundle: Bundle, labelled: pl.DataFrame) -> pl.DataFrame:
    """The scores that stand beside a fold's bundle, if they give the log loss that its manifest says."""
    path, task = bundle.folder.parent / OOF, bundle.config.task
    scores = read_scores(path, task)
    joined = scores.join(labelled.select("id", "target"), on="id", how="left", maintain_order="left")
    if unknown := joined.filter(pl.col("target").is_null())["id"].to_list():
        raise DataError(
            "rows that the fold held out are not among the labelled rows",
            where=path,
            rows=unknown,
            remedy="merge with the data and the rules that the fold was trained with",
        )
    loss = log_loss(class_matrix(joined, task), np.array(joined["target"].to_list()), multi_label=task.multi_label)
    said = bundle.manifest.metrics.get("log_loss", float("nan"))
    if not abs(loss - said) <= 1e-6:
        raise DataError(
            f"out-of-fold scores give log loss {loss:.6f}, and their bundle says {said:.6f}: they are not of one "
            "training, or labels changed since",
            where=path,
            remedy="merge with the data that the fold was trained with, or train the fold again",
        )
    return scores


def _score(bundle: Bundle, sample: Sample, base: Path | None) -> Floats:
    """Logits `(M, C)` of the sample's items by the bundle as it is read from disk."""
    classifier = bundle.load(pick_device(), base)
    logits = score(classifier, sample.items, tokens_per_batch=sample.tokens_per_batch, title=bundle.name)
    del classifier
    free_memory()
    return logits


def _probabilities(bundle: Bundle, sample: Sample, logits: Floats) -> Floats:
    """`(M, C)` logits of items -> `(N, C)` probabilities of rows, as `fit` makes them for its out-of-fold scores."""
    task, orders = bundle.config.task, by_order(sample.items, logits, len(sample.rows))
    return combine(probabilities(orders, task, bundle.config.predict.temperature), task)


def _reference(parts: Sequence[Part], sample: Sample, base: Path | None) -> Floats:
    """What the merged bundle's probabilities `(N, C)` are compared with.

    One fold: its out-of-fold scores. Else the mean of the parts' probabilities on these same rows: of each row, all
    parts but one were trained on it, and so was the mean of their weights; out-of-fold scores would flatter it.
    """
    if len(parts) == 1 and sample.out_of_fold is not None:
        return sample.out_of_fold
    scored = [_probabilities(part.bundle, sample, _score(part.bundle, sample, base)) for part in parts]
    mean: Floats = np.mean(scored, axis=0)
    return mean


def _probes(sample: Sample, logits: Floats) -> list[Probe]:
    lengths = [len(item.ids) for item in sample.items if item.order == AB]
    return pick_probes(sample.rows, lengths, by_order(sample.items, logits, len(sample.rows)))


def measure(sample: Sample, before: Floats, after: Floats, *, parts: int, drift: float | None, several: bool) -> Shift:
    """Compare probabilities `(N, C)` before and after the merge."""
    targets, change = sample.targets, np.abs(after - before)
    return Shift(
        parts=parts,
        rows=len(targets),
        reference=log_loss(before, targets, multi_label=several),
        merged=log_loss(after, targets, multi_label=several),
        reference_accuracy=accuracy(before, targets, multi_label=several),
        merged_accuracy=accuracy(after, targets, multi_label=several),
        largest=float(change.max()),
        mean=float(change.mean()),
        out_of_fold=None if sample.out_of_fold is None else log_loss(sample.out_of_fold, targets, multi_label=several),
        drift=drift,
    )


def render(shift: Shift) -> Table:
    """The figures as a table, with what they are not below it."""
    reference = "bundle" if shift.parts == 1 else "ensemble"
    shown = table(f"Merge of {shift.parts} bundle(s) on {shift.rows:,} rows", "", reference, "merged", "change")
    for name, before, after in (
        ("log loss", shift.reference, shift.merged),
        ("accuracy", shift.reference_accuracy, shift.merged_accuracy),
    ):
        shown.add_row(name, f"{before:.5f}", f"{after:.5f}", f"{after - before:+.5f}")
    shown.add_row("largest change of a probability", "", "", f"{shift.largest:.5f}")
    shown.add_row("mean change of a probability", "", "", f"{shift.mean:.5f}")
    shown.caption, shown.caption_justify = "\n".join(_notes(shift)), "left"
    return shown


def _notes(shift: Shift) -> list[str]:
    notes = []
    if shift.parts > 1:
        notes.append(
            f"In sample: all but one of the {shift.parts} bundles were trained on each row, so neither log loss is "
            "what new rows will have."
        )
        if shift.out_of_fold is not None:
            notes.append(f"Out of fold, the single bundles had {shift.out_of_fold:.5f} on these rows.")
    elif shift.out_of_fold is None:
        notes.append("In sample: the bundle was trained on these rows; only the change says something.")
    if shift.drift is not None:
        notes.append(f"The means of A and of B make another update than the mean of BA: off by {shift.drift:.0%}.")
    return notes


def judge(shift: Shift, max_shift: float, out: Path) -> None:
    """Do nothing if the merged bundle may stand for its parts.

    A merge into weights is meant to be the same function, so that any move counts, one for the better too. A mean of
    weights is another function than the ensemble by its nature; it may be better, and is refused where it is worse.

    Raises:
        BundleError: the log loss moved by more than `max_shift`.
    """
    several = shift.parts > 1
    counted = shift.moved if several else abs(shift.moved)
    if not counted <= max_shift:
        remedy = "predict with the bundles unmerged, or raise --max-shift if that is what it may cost"
        raise BundleError(
            f"merging moved the log loss by {shift.moved:+.5f}, from {shift.reference:.5f} to {shift.merged:.5f} on "
            f"{shift.rows:,} rows; --max-shift allows {max_shift:g}{' upwards' if several else ''}. "
            f"Nothing was written to {out}",
            remedy=f"--average exact keeps more of the parts; or {remedy}" if shift.drift is not None else remedy,
        )
