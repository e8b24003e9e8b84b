"""Every approach on the same rows: how well it predicts, what it trains, and how fast it is.

    python benchmarks/approaches.py --rows 450 --data FOLDER --model FOLDER [--encoder FOLDER] [--arms head reward]
    python benchmarks/approaches.py --write docs/approaches.md       # the table of what was measured, into the page

The rows are those of arena3 and arena2 (folders of `--data`, in the formats of LMSYS and WSDM) and of the synthetic
arena, which is generated. `--rows` of each are drawn by seed, and a third of them, which shares no prompt with the
others, is held out: fold 0 of three. All arms train on the same rows and score the same held-out ones.

One line of JSON an arm is appended to `results.jsonl` in `--out`. An arm that has a line there is not run again, so
that an interrupted benchmark continues. An arm that can't run (no model given, a base of another family) is skipped;
its line says why, and the next call tries it again.

The interval of the log loss is 1.96 standard errors over prompts: rows of one prompt are no independent ones. Rows a
second and minutes of training are of CPU time, of all threads together; set OMP_NUM_THREADS=1 to compare arms. Rows
are scored in both orders where an approach has two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import safe_open
from sklearn.metrics import f1_score

from pairclf.approaches import classical_model
from pairclf.approaches.protocol import LABEL_MASS, Fitted
from pairclf.bundles.base import resolve_base
from pairclf.bundles.contents import BundleFiles
from pairclf.config import Config, resolve
from pairclf.console import console, number
from pairclf.data.identity import row_hashes
from pairclf.data.rows import targets_of, to_rows
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import PairclfError
from pairclf.files import open_to_append, write_text
from pairclf.run import Run
from pairclf.runs.fit import open_session
from pairclf.scores.figures import measure
from pairclf.scores.metrics import Floats, class_prior, likeliest, log_loss
from pairclf.scores.probabilities import mean_of_orders, unswap
from pairclf.task import Task

START, END = "<!-- approaches: written by benchmarks/approaches.py -->\n", "<!-- end of the approaches -->\n"
RESULTS = "results.jsonl"
SYNTHETIC = "synthetic"
DATA: dict[str, tuple[str, str]] = {
    SYNTHETIC: ("lmsys", "train.csv"),
    "arena3": ("lmsys", "train.csv"),
    "arena2": ("wsdm", "train.parquet"),
}
"""Each data set with its task and its file of labelled rows."""

COLUMNS: dict[str, str] = {
    "log loss": "log_loss",
    "±": "interval",
    "accuracy": "accuracy",
    "macro F1": "macro_f1",
    "ECE": "expected_calibration_error",
    "flip rate": "flip_rate",
    "label mass": LABEL_MASS,
    "trained weights": "trained_weights",
    "weights": "weights",
    "rows/s": "rows_per_s",
    "training min": "training_min",
}
"""The columns of the page's tables behind the arm's name, and the keys of a line of results."""

TEXT = """

### Prompt
{prompt}

### Response a
{response_a}

### Response b
{response_b}

### Which response is better? """
ONE_SIDE = "\n\n### Prompt\n{prompt}\n\n### Response\n{response}\n\n### How good is the response?"


@dataclass(frozen=True, slots=True)
class Arm:
    """An approach with its settings.

    Attributes:
        title: its name in the table.
        tree: its part of a config.
        base: which of the models it needs: `model`, `encoder`, or none.
        labels: whether it scores label words, and so asks for them.
        context: its `inputs.max_length` in units of `--max-length`: examples take room, too.
    """

    title: str
    tree: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = "model"
    labels: bool = False
    context: int = 1


TUNED = {"num_train_epochs": 1, "global_batch_size": 16, "learning_rate": 1e-3, "swap": "random"}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
HEAD_RATE = 5e-3

ARMS: dict[str, Arm] = {
    "logistic": Arm("classical, logistic regression", {"approach": "classical"}, base=None),
    "lightgbm": Arm("classical, LightGBM", {"approach": "classical", "classical": {"model": "lightgbm"}}, base=None),
    "zero-shot": Arm("zero-shot", {"approach": "prompt", "prompt": {"k": 0}}, labels=True),
    "four-shot": Arm("4-shot", {"approach": "prompt", "prompt": {"k": 4}}, labels=True, context=2),
    "four-shot-calibrated": Arm(
        "4-shot, calibrated", {"approach": "prompt", "prompt": {"k": 4, "calibration": "batch"}}, labels=True, context=2
    ),
    "label-tokens": Arm("label tokens, LoRA", {"model": {"lora": LORA}, "train": TUNED}, labels=True),
    "head": Arm("head, LoRA", {"model": {"lora": LORA}, "train": {**TUNED, "head_learning_rate": HEAD_RATE}}),
    "reward": Arm(
        "reward, LoRA",
        {
            "model": {"lora": LORA, "readout": "reward"},
            "train": {**TUNED, "head_learning_rate": HEAD_RATE, "swap": "none", "layout": "shared"},
            "inputs": {"template": {"text": ONE_SIDE}},
        },
    ),
    "encoder": Arm(
        "encoder, all weights",
        {
            "model": {"lora": None, "pooling": "mean"},
            "train": {**TUNED, "learning_rate": 5e-5, "head_learning_rate": 1e-3},
            "inputs": {"template": {"preset": "tagged"}},
        },
        base="encoder",
    ),
}


def config_of(arm: Arm, name: str, options: argparse.Namespace, output: Path) -> Config:
    """The config of an arm on one of the data sets.

    Raises:
        ConfigError: settings can't go together.
    """
    task, file = DATA[name]
    folder = options.out / SYNTHETIC if name == SYNTHETIC else options.data / name
    tree: dict[str, Any] = {
        "task": task,
        "seed": options.seed,
        "output_dir": str(output),
        "data": {"folder": str(folder), "train": [file], "max_rows": options.rows},
        "folds": {"n_splits": 3},
        **{key: dict(value) if isinstance(value, Mapping) else value for key, value in arm.tree.items()},
    }
    if arm.base is not None:
        shown = {"preset": "judge", "text": TEXT + _question(task)} | tree.get("inputs", {}).get("template", {})
        if shown["preset"] == "tagged":
            del shown["text"]
        tree["inputs"] = {"max_length": arm.context * options.max_length, "template": shown}
        tree["model"] = {"base": str(getattr(options, arm.base)), "quantization": "none"} | tree.get("model", {})
        tree["predict"] = {"tokens_per_batch": max(2048, 2 * arm.context * options.max_length)}
    if arm.labels:
        words = dict(zip(resolve({"task": task}).task.classes, ("A", "B", "C"), strict=False))
        tree["model"] |= {"readout": "label_tokens", "label_words": words}
    return resolve(tree)


def _question(task: str) -> str:
    return "A for response a, B for response b" + (", C for a tie" if task == "lmsys" else "")


# --- one arm ---------------------------------------------------------------------------------------------------------


def run_arm(arm: Arm, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train an arm on two thirds of the rows, score the rest, and measure it.

    Raises:
        PairclfError: it can't run here.
    """
    output = options.out / "arm"
    shutil.rmtree(output, ignore_errors=True)
    config = config_of(arm, name, options, output)
    session = open_session(Run(config), [0])
    split = session.run.split(0)
    assert split.held_out is not None
    start = time.process_time()
    fitted = session.trainer.fit(split, output / "fold0", resume=None, trust_checkpoint=False)
    trained = time.process_time()
    assert fitted is not None
    logits = fitted.logits(split.held_out)
    seconds = time.process_time() - trained
    figures = {"training": len(split.training), "held_out": len(split.held_out)} | measured(
        split.held_out, logits, config
    )
    prior = np.tile(class_prior(targets_of(split.training)), (len(split.held_out), 1))
    figures |= {"prior_log_loss": log_loss(prior, targets_of(split.held_out))}
    figures |= weights_of(fitted, config, output / "saved")
    if config.approach == "classical":  # `fitted` has the features of all rows; a test file's are to be made
        seconds = seconds_from_texts(output / "saved", split.held_out, config)
    figures |= {"training_min": (trained - start) / 60, "rows_per_s": len(split.held_out) / seconds}
    mass = fitted.record.get(LABEL_MASS)
    shutil.rmtree(output, ignore_errors=True)
    return figures if mass is None else figures | {LABEL_MASS: mass}


def seconds_from_texts(saved: Path, rows: pl.DataFrame, config: Config) -> float:
    """CPU seconds in which a saved classical model scores rows."""
    model = classical_model.load(BundleFiles(saved).classical, config.task, config.classical)
    start = time.process_time()
    model.logits(to_rows(rows, config.task))
    return time.process_time() - start


def measured(held_out: pl.DataFrame, logits: Floats, config: Config) -> dict[str, float]:
    """The metrics of held-out rows from their logits `(N, O, C)`."""
    task, targets = config.task, targets_of(held_out)
    values = mean_of_orders(logits, task, config.predict.temperature)
    figures = dict(measure(values, targets, task))
    figures["interval"] = interval(values, targets, row_hashes(held_out, task)["prompt"])
    figures["macro_f1"] = float(f1_score(targets.argmax(axis=1), likeliest(values), average="macro"))
    if (flipped := flip_rate(logits, task)) is not None:
        figures["flip_rate"] = flipped
    return figures


def interval(values: Floats, targets: Floats, prompts: pl.Series) -> float:
    """Half the 95% interval of the mean log loss, in nats: 1.96 standard errors, clustered by prompt.

    Args:
        values: probabilities `(N, C)`.
        targets: `(N, C)`.
        prompts: `(N,)`, equal where rows share a prompt.
    """
    losses = -(targets * np.log(np.clip(values, 1e-15, 1))).sum(axis=1)
    by_prompt = pl.DataFrame({"prompt": prompts, "excess": losses - losses.mean()}).group_by("prompt").sum()
    return float(1.96 * np.sqrt((by_prompt["excess"] ** 2).sum()) / len(losses))


def flip_rate(logits: Floats, task: Task) -> float | None:
    """The share of rows whose likeliest class changes with the order of the sides; None: there is one order.

    Args:
        logits: `(N, O, C)`, each order in its own columns.
        task: how columns swap.
    """
    if logits.shape[1] == 1:
        return None
    first, second = likeliest(logits[:, 0]), likeliest(unswap(logits, task)[:, 1])
    return float((first != second).mean())


def weights_of(fitted: Fitted, config: Config, folder: Path) -> dict[str, int]:
    """How many numbers were trained, and how many the model has, its base included."""
    folder.mkdir(parents=True)
    saved = fitted.save(folder)
    written = sum(map(elements, folder.rglob("*.safetensors"))) + sum(map(leaves, folder.glob("*.txt")))
    if saved.weights == "none":
        return {"trained_weights": written, "weights": written}
    frozen = elements(BundleFiles(folder).head) if config.model.readout == "label_tokens" else 0
    base = sum(map(elements, Path(resolve_base(config.model.base)).glob("*.safetensors")))
    if saved.weights == "whole":
        return {"trained_weights": written - frozen, "weights": written}
    return {"trained_weights": written - frozen, "weights": base + written - frozen}


def elements(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with safe_open(path, "np") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def leaves(path: Path) -> int:
    """Leaf values in LightGBM's text format."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(len(line.split(" ")) for line in lines if line.startswith("leaf_value="))


# --- all arms --------------------------------------------------------------------------------------------------------


def read_results(out: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The lines of results by what identifies them; of two the later, which replaces what was skipped."""
    path = out / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {tuple(line[key] for key in KEYS): line for line in map(json.loads, lines)}


KEYS = ("data", "rows", "seed", "arm", "base", "max_length")


def identity_of(arm: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a line of results is the result of. `base` is the name of a folder, or of an embedded model."""
    kind = ARMS[arm].base
    base = None if kind is None else Path(getattr(options, kind) or "").name
    length = None if kind is None else options.max_length
    return dict(zip(KEYS, (name, options.rows, options.seed, arm, base, length), strict=True))


def run(options: argparse.Namespace) -> None:
    """Run the arms that have no result yet, data set by data set."""
    finished = read_results(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        if name == SYNTHETIC and not (options.out / SYNTHETIC).exists():
            write_lmsys(generate(options.arena_rows, seed=options.seed), options.out / SYNTHETIC, n_test=4)
        for arm in options.arms:
            identity = identity_of(arm, name, options)
            before = finished.get(tuple(identity.values()))
            if before is not None and "skipped" not in before:
                continue
            console.rule(f"{name}: {ARMS[arm].title}", align="left")
            result = identity | attempted(arm, name, options)
            with open_to_append(options.out / RESULTS) as file:
                file.write(f"{json.dumps(result)}\n".encode())
            console.print(json.dumps(result))


def attempted(arm: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of an arm, or why it was skipped."""
    kind = ARMS[arm].base
    if kind is not None and getattr(options, kind) is None:
        return {"skipped": f"no --{kind} was given"}
    if name != SYNTHETIC and options.data is None:
        return {"skipped": "no --data was given"}
    try:
        return run_arm(ARMS[arm], name, options)
    except PairclfError as error:
        return {"skipped": str(error).splitlines()[0]}


# --- the page --------------------------------------------------------------------------------------------------------


def tables(results: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """Markdown: a table for each data set and number of rows; arms in the order of `ARMS`."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in sorted(results.values(), key=lambda line: list(ARMS).index(line["arm"])):
        groups.setdefault((result["data"], result["rows"]), []).append(result)
    return "".join(_table(*group, lines) for group, lines in sorted(groups.items(), key=lambda item: item[0][::-1]))


def _table(name: str, rows: int, lines: list[Mapping[str, Any]]) -> str:
    done = [line for line in lines if "skipped" not in line]
    if not done:
        return ""
    sizes = {(line["training"], line["held_out"]) for line in done}
    if len(sizes) > 1:
        raise SystemExit(f"{name}, {rows} rows: arms had different numbers of training and held-out rows: {sizes}")
    training, held_out = sizes.pop()
    head = [
        f"\n**{name}**: {training:,} training rows, {held_out:,} held-out rows; log loss of the class prior "
        f"{done[0]['prior_log_loss']:.4f}\n",
        header(),
    ]
    return "\n".join([*head, *(_row(line) for line in done), *_not_measured(lines), ""])


def header() -> str:
    """The first two lines of each table."""
    return f"| approach | base | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}"


def _row(line: Mapping[str, Any]) -> str:
    return f"| {ARMS[line['arm']].title} | {line['base'] or '-'} | {' | '.join(_cells(line))} |"


def _cells(line: Mapping[str, Any]) -> Iterator[str]:
    for key in COLUMNS.values():
        value = line.get(key)
        if value is None:
            yield "-"
        elif key in ("trained_weights", "weights"):
            yield _count(value)
        elif key in ("rows_per_s", "training_min"):
            yield f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        else:
            yield number(value, 4 if key in ("log_loss", "interval") else 3)


def _count(value: int) -> str:
    """`134.5M`, `2.4k`, `0`."""
    for size, unit in ((10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def _not_measured(lines: list[Mapping[str, Any]]) -> list[str]:
    """The arms without figures: those that were skipped, and why, and those that were not run."""
    reasons = {line["arm"]: f" ({line['skipped']})" if "skipped" in line else None for line in lines}
    missing = [ARMS[arm].title + (reasons.get(arm) or "") for arm in ARMS if arm not in reasons or reasons[arm]]
    return [f"\nNot measured: {'; '.join(missing)}."] if missing else []


def write_page(page: Path, out: Path) -> None:
    """Put the tables of all results between the markers of a page."""
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{page} lacks the lines {START.strip()} and {END.strip()}")
    write_text(page, before + START + tables(read_results(out)) + "\n" + END + after)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=450, help="rows drawn of each data set; a third is held out")
    parser.add_argument("--data", type=Path, help="folder that holds arena3 and arena2")
    parser.add_argument("--sets", nargs="+", choices=DATA, default=list(DATA), help="data sets")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="approaches")
    parser.add_argument("--model", help="folder of an instruction-tuned decoder, or embedded:llama-tiny")
    parser.add_argument("--encoder", help="folder of an encoder")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a row; twice as many with examples")
    parser.add_argument("--arena-rows", type=int, default=4_404, help="rows of the synthetic arena that are generated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/approaches"), help="folder of results.jsonl")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="run nothing; write the tables into this page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    if options.write:
        write_page(options.write, options.out)
    else:
        run(options)
        lines = read_results(options.out).values()
        print(json.dumps({line["arm"]: line.get("log_loss", line.get("skipped")) for line in lines}))


if __name__ == "__main__":
    main()
