"""Examples of tasks: small files for each config in configs/examples, generated with known true probabilities.

A text holds words that tell something about its class, and words that tell nothing. The number of telling words gives
the true probabilities, and the label is drawn from these; so the lowest possible log loss is known.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import polars as pl
from scipy.special import expit, softmax

from pairclf.config import Config, load_config, run_folder
from pairclf.demo.arena import davidson
from pairclf.errors import ConfigError
from pairclf.files import atomic_file, write_text
from pairclf.own_files import shipped
from pairclf.task import Task

Drawn = tuple[dict[str, str], Sequence[float]]
"""Cells of a row by column, and the true probability of each class."""


@dataclass(frozen=True, slots=True)
class ExampleTask:
    """A task with generated files; its config is `configs/examples/NAME.yaml`.

    Attributes:
        title: what it is an example of.
        draw: the cells and the truth of a row. Rows with one number of `row // 3` share question or group.
        sample: columns of the sample submission besides the ids, and their value.
    """

    title: str
    draw: Callable[[Random, int, Task], Drawn]
    sample: Mapping[str, str]


# --- texts -----------------------------------------------------------------------------------------------------------

_THINGS = ("plot", "cast", "music", "ending", "dialogue", "pace", "camera", "script", "lead", "humour", "set", "score")
_PRAISE = ("brilliant", "moving", "clever", "superb", "warm", "gripping", "charming", "flawless")
_BLAME = ("dull", "clumsy", "tedious", "awful", "shallow", "predictable", "noisy", "lifeless")
_PLAIN = ("familiar", "modern", "long", "quiet", "European", "colourful", "short", "unusual")
_INSULTS = ("idiot", "moron", "stupid", "pathetic", "loser", "clown", "garbage", "shut up")
_TALK = (
    "yesterday",
    "the article",
    "in my view",
    "the council",
    "a source",
    "the table",
    "thanks",
    "page two",
    "maybe",
)

_TOPICS = {
    "art": "painting sculpture gallery canvas portrait fresco pigment sketch",
    "biology": "cell protein species gene enzyme membrane bacteria evolution",
    "cooking": "oven flour simmer recipe garlic dough butter sauce",
    "economy": "inflation market interest trade tariff budget wages exports",
    "gardening": "soil seeds pruning compost tulips hedge watering greenhouse",
    "law": "court judge statute appeal contract verdict clause plaintiff",
    "music": "melody chord violin rhythm orchestra tempo chorus sonata",
    "physics": "quantum energy particle gravity momentum photon field mass",
    "sports": "match goal coach league sprint referee stadium medal",
    "travel": "airport luggage hotel passport ferry island visa itinerary",
}
_FIELDS = {
    "chemistry": "polymer catalyst solvent resin oxide",
    "electricity": "circuit voltage electrode capacitor winding",
    "mechanics": "shaft bearing gear valve piston",
    "medicine": "implant catheter dosage tissue syringe",
    "software": "processor memory packet database encryption",
}
_RARITY = {"chemistry": -1.0, "electricity": -2.0, "mechanics": -1.5, "medicine": -3.0, "software": -2.5}
"""Log odds of a label without any of its words: all are rarer than not, medicine the rarest."""

_COMMON = (
    "method", "device", "system", "first", "second", "part", "time", "result", "several", "between", "along", "under",
    "large", "small", "new",
)  # fmt: skip
_VERBS = ("repair", "clean", "paint", "store", "choose", "measure", "sell", "move", "test", "carry")
_OBJECTS = ("bicycle", "wardrobe", "window", "carpet", "engine", "lantern", "mirror", "saddle", "kettle", "ladder")
_STEPS = (
    "Begin with the screws.", "Use a soft cloth.", "Wear gloves.", "Check the label twice.", "Let it dry overnight.",
    "Write down each size.", "Ask a second person to hold it.", "Keep the parts in a box.",
)  # fmt: skip
_VAGUE = (
    "It depends.", "I am not sure.", "Just look it up.", "There are many ways.", "Who knows.", "Simply do it.",
    "That is hard to say.", "Some people manage.",
)  # fmt: skip


def _filler(random: Random, length: int) -> str:
    return " ".join(random.choices(_COMMON, k=length))


def _review(random: Random, row: int, task: Task) -> Drawn:
    moods = [random.choice((_PRAISE, _BLAME, _PLAIN)) for _ in range(6)]
    things = random.sample(_THINGS, k=len(moods))
    sentences = [f"The {thing} is {random.choice(mood)}." for thing, mood in zip(things, moods, strict=True)]
    liked = float(expit(1.5 * (moods.count(_PRAISE) - moods.count(_BLAME))))
    return {"review": " ".join(sentences), "author": f"author {row // 3}"}, [1 - liked, liked]


def _topic(random: Random, row: int, task: Task) -> Drawn:
    main = random.choice(task.classes)
    drawn = [main if random.random() < 0.6 else random.choice(task.classes) for _ in range(8)]
    words = " ".join(random.choice(_TOPICS[topic].split()) for topic in drawn)
    truth = softmax([1.5 * drawn.count(topic) for topic in task.classes])
    return {"text": f"{_filler(random, 6)} {words} {_filler(random, 6)}"}, truth.tolist()


def _patent(random: Random, row: int, task: Task) -> Drawn:
    counts = {name: random.choice((0, 0, 0, 1, 2, 3)) for name in task.classes}
    telling = [word for name, count in counts.items() for word in random.sample(_FIELDS[name].split(), k=count)]
    cells = {"title": " ".join([_filler(random, 3), *telling[:1]]), "applicant": f"applicant {row // 3}"}
    cells["abstract"] = " ".join([*telling[1:], _filler(random, 15)])
    return cells, [float(expit(_RARITY[name] + 1.5 * count)) for name, count in counts.items()]


def _comment(random: Random, row: int, task: Task) -> Drawn:
    count = random.choice((0, 0, 0, 1, 2))
    words = random.sample(_INSULTS, k=count) + random.choices(_TALK, k=6) + random.choices(_COMMON, k=8)
    random.shuffle(words)
    return {"comment": " ".join(words)}, [float(expit(2.5 * count - 2.5))]


def _comparison(random: Random, row: int, task: Task) -> Drawn:
    asked = Random(row // 3)  # the same question for the rows of a group
    question = f"How do I {' and '.join(asked.sample(_VERBS, k=2))} a {asked.choice(_OBJECTS)} of type {row // 3}?"
    cells, utilities = {"question": question}, []
    for field in ("answer_1", "answer_2"):
        steps, vague = random.randint(0, 4), random.randint(0, 2)
        sentences = random.sample(_STEPS, k=steps) + random.sample(_VAGUE, k=vague)
        random.shuffle(sentences)
        cells[field] = " ".join(sentences)
        utilities.append(0.9 * (steps - vague))
    truth = davidson(np.array(utilities[:1]), np.array(utilities[1:]))[0]
    if len(task.classes) == 2:
        truth = truth[:2] / truth[:2].sum()
    else:
        cells["question_id"] = f"question {row // 3}"
    return cells, truth.tolist()


EXAMPLES: dict[str, ExampleTask] = {
    "sentiment": ExampleTask("one text, two classes", _review, {"sentiment": "0.5"}),
    "topics": ExampleTask("one text, ten classes", _topic, {"topic": "art"}),
    "patents": ExampleTask("several labels a row", _patent, dict.fromkeys(_FIELDS, "0")),
    "toxic": ExampleTask("one label that a row has or not", _comment, {"toxic": "0"}),
    "answers": ExampleTask("two answers, two classes", _comparison, {"better": "1"}),
    "verdicts": ExampleTask("two answers, or a tie", _comparison, {"first": "0", "second": "0", "tie": "1"}),
}
"""The examples by their names in `pairclf example NAME`."""


# --- files -----------------------------------------------------------------------------------------------------------


def write_example(
    name: str, folder: Path | None = None, *, rows: int = 600, test_rows: int = 150, seed: int = 0
) -> Path:
    """Write `train.csv`, `test.csv`, `sample_submission.csv`, `truth.parquet` and the config of an example.

    Args:
        name: key of `EXAMPLES`.
        folder: for the files; None: the `data.folder` of the config.
        rows: of `train.csv`.
        test_rows: of `test.csv`; they share no question or group with the training rows.
        seed: of all that is drawn; the same one gives the same files.

    Returns:
        The config's path, `folder/NAME.yaml`; it reads the files where they were written.

    Raises:
        ConfigError: there is no such example, or the folder is not empty.
    """
    if name not in EXAMPLES:
        raise ConfigError(f"{name} is no example", remedy=f"one of {', '.join(EXAMPLES)}")
    template = shipped(f"configs/examples/{name}.yaml")
    config = load_config(template)
    folder = config.data.folder if folder is None else folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds files already", remedy="name a new folder: --folder FOLDER")
    train, test, truth = _draw(EXAMPLES[name], config, rows, test_rows, seed)
    sample = test.select(test.columns[0], *(pl.lit(value).alias(key) for key, value in EXAMPLES[name].sample.items()))
    for file, frame in (("train.csv", train), ("test.csv", test), ("sample_submission.csv", sample)):
        with atomic_file(folder / file) as path:
            frame.write_csv(path)
    with atomic_file(folder / "truth.parquet") as path:
        truth.write_parquet(path)
    before, key, after = template.read_text(encoding="utf-8").partition("  folder: ")
    place = f"{key}{json.dumps(str(folder))}\n{after.partition(chr(10))[2]}"
    write_text(folder / f"{name}.yaml", before + place)
    return folder / f"{name}.yaml"


def _draw(
    example: ExampleTask, config: Config, rows: int, test_rows: int, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Training rows, test rows and the truth of all, `id` and a column a class."""
    task, random = config.task, Random(f"{config.task.name} {seed}")
    id_column = config.data.sources[0].columns.get("id") or "id"
    table, truth = [], []
    first_test = 3 * -(-rows // 3)  # a question is on one side
    for row in [*range(rows), *range(first_test, first_test + test_rows)]:
        cells, chances = example.draw(random, row, task)
        table.append({id_column: f"r{row}", **cells, **_label(random, task, chances)})
        truth.append({"id": f"r{row}", **dict(zip(task.classes, chances, strict=True))})
    frame = pl.DataFrame(table)
    unseen = {*task.classes, str(task.label_column), str(config.folds.group)}
    test = frame.tail(test_rows).drop([column for column in frame.columns if column in unseen])
    return frame.head(rows), test, pl.DataFrame(truth)


def _label(random: Random, task: Task, chances: Sequence[float]) -> dict[str, str]:
    """The columns of the label, drawn from the true probabilities."""
    if task.multi_label:
        return {name: str(int(random.random() < chance)) for name, chance in zip(task.classes, chances, strict=True)}
    return {str(task.label_column): random.choices(task.classes, weights=chances)[0]}


def next_commands(config: Path) -> str:
    """The commands that lead from an example's files to a notebook, one a line."""
    folder, name = config.parent, config.stem
    train, test, sample, truth, path = (
        shlex.quote(str(folder / file))
        for file in ("train.csv", "test.csv", "sample_submission.csv", "truth.parquet", config.name)
    )
    bundles = f"{shlex.quote(str(run_folder(config)))}/fold*/bundle"
    return "\n".join(
        [
            f"wrote {folder}: {EXAMPLES[name].title}",
            f"pairclf check {train} --task {path}",
            f"pairclf cv {path}",
            f"pairclf evaluate {path} --truth {truth}",
            f"pairclf predict {bundles} --data {test} --sample {sample}",
            f"pairclf package {path} package.owner=YOUR-KAGGLE-NAME --out kaggle/build/{name}",
        ]
    )
