"""Rows that tests of several rooms share."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from pairclf.config import Config, deciding_settings, dump_config
from pairclf.files import sha256_tree, write_json
from pairclf.run import TRAINED, TRAINING
from pairclf.task import LMSYS, Row

STRANGE = [*'a"\\\n\t\x00\x07\x7fé😀', "שלום", "\u202e", "\ufffd", "[", "]", ",", " "]


def make_rows(count: int) -> list[Row]:
    """Rows of different lengths whose winner can be read from the text."""
    rows = []
    for number in range(count):
        good, bad = "yes " * (1 + number % 5), "no " * (2 + number % 7)
        winner = number % 3
        a, b = ((good, bad), (bad, good), (good, good))[winner]
        target = tuple(float(index == winner) for index in range(3))
        fields = {"prompt": (f"question {number}",), "response_a": (a,), "response_b": (b, "more")[: 1 + number % 2]}
        rows.append(Row(str(number), fields, target))
    return rows


def strange_cell(draw: random.Random) -> str:
    """JSON-ish: lists of strange texts, whole, cut or spoiled."""
    texts = ["".join(draw.choices(STRANGE, k=draw.randint(0, 12))) for _ in range(draw.randint(0, 3))]
    cell = json.dumps([None if draw.random() < 0.1 else text for text in texts], ensure_ascii=draw.random() < 0.5)
    kind = draw.random()
    if kind < 0.1:
        return cell.replace("a", "\\ud83d")
    if kind < 0.2:
        return cell[: draw.randint(0, len(cell))]
    if kind < 0.25:
        return "".join(texts)
    if kind < 0.3:
        return draw.choice(["null", "[null]", "", "[]", "[[1]]", "{}", "1e999", "[" * 500, '["' + "x" * 20_000 + '"]'])
    return cell


def strange_file(folder: Path, count: int) -> Path:
    """`strange.csv` with so many rows; ids are missing or repeated here and there, labels no labels."""
    draw = random.Random(count)
    cells = {name: [strange_cell(draw) for _ in range(count)] for name in LMSYS.fields}
    sound = ["100", "010", "001"]
    drawn = [draw.choice(sound if draw.random() < 0.95 else ["11x", "000", "x 1"]) for _ in range(count)]
    labels = {name: [label[place] for label in drawn] for place, name in enumerate(LMSYS.classes)}
    ids = [draw.choice(["", str(row), "7"]) if draw.random() < 0.1 else str(row) for row in range(count)]
    path = folder / "strange.csv"
    pl.DataFrame({"id": ids, **cells, **labels}).write_csv(path)
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows as a training file in the LMSYS format."""
    cells = [
        {
            "id": row.id,
            **{name: json.dumps(turns) for name, turns in row.fields.items()},
            **dict(zip(LMSYS.classes, row.target or (), strict=True)),
        }
        for row in rows
    ]
    pl.DataFrame(cells).write_csv(path)


def hollow_run(folder: Path, *configs: Config, metrics: Sequence[Mapping[str, float]] = (), **record: object) -> Path:
    """A run of hollow bundles, a fold for each config, and what `trained.json` records of their trainings."""
    for fold, config in enumerate(configs):
        figures = metrics[fold] if metrics else None
        hollow_bundle(
            folder / f"fold{fold}" / "bundle", config, f"{folder.name}-fold{fold}", fold=fold, metrics=figures
        )
        write_json(folder / f"fold{fold}" / TRAINED, deciding_settings(config) | {TRAINING: record})
    return folder


def hollow_bundle(
    folder: Path,
    config: Config,
    name: str,
    *,
    fold: int = 0,
    metrics: Mapping[str, float] | None = None,
    prior: Sequence[float] = (),
    thresholds: Sequence[float] = (),
) -> Path:
    """A folder that `open_bundle` accepts; its weights are no weights."""
    from pairclf.bundles.bundle import Saved, write_bundle
    from pairclf.bundles.contents import MANIFEST
    from pairclf.bundles.manifest import read_manifest

    for part in ("adapter/adapter_model.safetensors", "head.safetensors", "tokenizer/tokenizer.json"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text(f"{{}} {part}")
    classes = len(config.task.classes)
    write_bundle(
        folder,
        config,
        Saved("finetune", "adapter" if config.model.lora else "whole", "float32", (), "f" * 64),
        name=name,
        fold=fold,
        metrics={"log_loss": 1.01} if metrics is None else dict(metrics),
        prior=list(prior) or [1 / classes] * classes,
        probes=[],
        thresholds=thresholds,
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")  # nothing of it left out
    hashes = sha256_tree(folder, without=frozenset({MANIFEST}))
    replace(read_manifest(folder), base=config.model.base, files=hashes).write(folder)
    return folder
