"""`Config`: all sections, and the rules between their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pairclf.config.classical import Classical
from pairclf.config.data import Data, Folds
from pairclf.config.inputs import Inputs
from pairclf.config.kaggle import Package
from pairclf.config.model import Lora, Model
from pairclf.config.predict import Predict
from pairclf.config.prompt import Prompt
from pairclf.config.renamed import ELSEWHERE, RENAMED
from pairclf.config.section import Section
from pairclf.config.train import Train
from pairclf.config.wording import complete_example, complete_template
from pairclf.errors import ConfigError
from pairclf.task import LMSYS, SIDE, TASKS, Task, as_task

SECTIONS = {
    "finetune": ("inputs", "model", "train"),
    "prompt": ("inputs", "model", "prompt"),
    "classical": ("classical",),
}
"""Sections that an approach reads besides those that all of them do."""


ANSWERS = ("yes", "no")
"""What is said of a label, where a row may have several."""

BY_FIELD = ("budget_shares", "min_tokens", "truncation", "head_ratio")
"""Settings of `inputs` that have a value for each field."""


def _reader_of(*sections: str) -> str:
    """The approach that reads the most of these sections."""
    return max(SECTIONS, key=lambda approach: len({*sections} & {*SECTIONS[approach]}))


class Config(Section):
    """The whole tree. A run folder, a bundle and a Kaggle package each keep the resolved one."""

    renamed, elsewhere = RENAMED, ELSEWHERE

    task: Annotated[Task, BeforeValidator(as_task)] = Field(
        LMSYS, description=f"name of a task ({', '.join(TASKS)}), or a mapping that defines one"
    )
    approach: Literal["finetune", "prompt", "classical"] = Field(
        "finetune",
        description="kind of model: a language model or encoder that is trained, one that is prompted and not trained, "
        "or TF-IDF and measures of the texts with linear models, neighbours or trees",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="random seed of folds, row order, head initialisation and dropout")
    output_dir: Path | None = Field(
        None, description="run folder; null: the config's path below configs/, but below runs/ and without .yaml"
    )
    data: Data = Field(default_factory=Data, description="files")
    folds: Folds = Field(default_factory=Folds, description="cross-validation")
    inputs: Inputs = Field(default_factory=Inputs, description="from text to tokens")
    model: Model = Field(default_factory=Model, description="base model, adapters and head")
    train: Train = Field(default_factory=Train, description="fine-tuning")
    prompt: Prompt = Field(default_factory=Prompt, description="examples before each row")
    classical: Classical = Field(
        default_factory=Classical, description="TF-IDF with linear models, neighbours or trees"
    )
    predict: Predict = Field(default_factory=Predict, description="inference")
    package: Package = Field(default_factory=Package, description="the Kaggle notebook and what it attaches")

    @model_validator(mode="after")
    def _derive(self) -> Config:
        self._refuse_unread()
        self._check_sides()
        self._check_labels()
        self._complete_wording()
        self._complete_truncation()
        self._check_training()
        self._check_readout()
        return self

    @property
    def trains_all(self) -> bool:
        """Whether all weights of the base are trained."""
        return self.model.lora is None and self.trains

    @property
    def trains(self) -> bool:
        """Whether the section `train` is read, and trains something."""
        return self._reads("train") and self.train.max_steps != 0

    @property
    def num_examples(self) -> int:
        """Examples before each row."""
        return self.prompt.k if self._reads("prompt") else 0

    @property
    def rationale(self) -> int:
        """Most tokens that the model writes before its label."""
        return self.prompt.rationale if self._reads("prompt") else 0

    @property
    def orders(self) -> int:
        """Orders of a row's two sides that a model sees differently."""
        return 2 if self.task.swappable and not self.model.one_sided else 1

    @property
    def by_label(self) -> bool:
        """Whether each label of a row has a text of its own, which yes or no follows."""
        return self.task.multi_label and self.model.readout == "label_tokens"

    @property
    def answers(self) -> tuple[str, ...]:
        """What `model.label_words` has words for."""
        return ANSWERS if self.by_label else self.task.classes

    @property
    def is_pointwise(self) -> bool:
        """Whether a reward model scores one text a row (`pointwise`)."""
        return self.model.one_sided and not self.task.swappable

    def pointwise(self) -> Config:
        """The config of a reward model that scores one text a row: the recipe is that of a pair's either side."""
        task, (side, _) = self.task.pointwise, self.task.swap_fields or ("", "")
        by_field = {
            key: {name: getattr(self.inputs, key)[side if name == SIDE else name] for name in task.fields}
            for key in BY_FIELD
        }
        return self.model_copy(update={"task": task, "inputs": self.inputs.model_copy(update=by_field)})

    def _reads(self, section: str) -> bool:
        return section in SECTIONS[self.approach]

    def unread(self) -> list[str]:
        """Sections that the approach does not read."""
        named = dict.fromkeys(name for names in SECTIONS.values() for name in names)
        return [name for name in named if not self._reads(name)]

    def _refuse_unread(self) -> None:
        """A setting that changes nothing is a mistake; `pairclf config` prints those alone that are read."""
        changed, sections = [], []
        for name in self.unread():
            section = getattr(self, name)
            default = type(section)()
            if own := [key for key in type(section).model_fields if getattr(section, key) != getattr(default, key)]:
                changed += [f"{name}.{key}" for key in own]
                sections.append(name)
        if changed:
            raise ValueError(
                f"{', '.join(changed)} {'changes' if len(changed) == 1 else 'change'} nothing: "
                f"approach={self.approach} does not read the section{'s' * (len(sections) > 1)} {', '.join(sections)}; "
                f"remove what is set there, or set approach={_reader_of(*sections)}"
            )

    def require(self, section: str, command: str) -> None:
        """Raises `ConfigError` where a command is about a section that the approach does not read."""
        if section in self.unread():
            raise ConfigError(
                f"pairclf {command} is about the section {section} ({type(self).model_fields[section].description}), "
                f"which approach={self.approach} does not read",
                where="approach",
                remedy=f"give a config with approach={_reader_of(section)}",
            )

    def _complete_wording(self) -> None:
        template, words = self.inputs.template, self.model.scored_words.values()
        one_sided, examples = self.model.one_sided, self.num_examples > 0
        if self._reads("prompt") and not examples and "examples" not in self.task.fields:
            template.text = template.text.replace("{examples}", "")
        complete_template(
            template,
            self.task,
            one_sided=one_sided,
            by_label=self.by_label,
            examples=examples,
            rationale=self.rationale > 0,
        )
        if self.num_examples:
            each = [word for synonyms in words for word in synonyms]
            complete_example(self.prompt, template, self.task, each, by_label=self.by_label)

    def _complete_truncation(self) -> None:
        inputs, task = self.inputs, self.task
        inputs.budget_shares = inputs.budget_shares or dict.fromkeys(task.fields, round(1 / len(task.fields), 6))
        inputs.min_tokens = inputs.min_tokens or dict.fromkeys(task.fields, 1)
        inputs.truncation = inputs.truncation or dict.fromkeys(task.fields, "head_tail")
        if not isinstance(inputs.head_ratio, dict):
            inputs.head_ratio = dict.fromkeys(task.fields, inputs.head_ratio)
        for key in BY_FIELD:
            by_field = getattr(inputs, key)
            if set(by_field) != set(task.fields):
                raise ValueError(
                    f"inputs.{key} names {sorted(by_field)}; it must name each of the task's fields {list(task.fields)}"
                )
            if task.swap_fields and by_field[task.swap_fields[0]] != by_field[task.swap_fields[1]]:
                raise ValueError(
                    f"inputs.{key} must give {' and '.join(task.swap_fields)} the same value, or the two orders would "
                    "be truncated differently"
                )
        if min(inputs.budget_shares.values()) < 0.001 or sum(inputs.budget_shares.values()) > 1.001:
            raise ValueError(f"inputs.budget_shares {inputs.budget_shares} must be at least 0.001 and sum to at most 1")
        if min(inputs.min_tokens.values()) < 1:
            raise ValueError(f"inputs.min_tokens {inputs.min_tokens} must be at least 1")
        if not all(0 <= ratio <= 1 for ratio in inputs.head_ratio.values()):
            raise ValueError(f"inputs.head_ratio {inputs.head_ratio} must be from 0 to 1")

    def _check_training(self) -> None:
        train, task, words = self.train, self.task, self.model.label_words
        different = {word for synonyms in words.values() for word in synonyms}
        if self.orders == 1 and (train.swap == "random" or train.consistency_weight):
            why = f"the task {task.name} has none" if not task.swappable else "model.readout=reward sees one at a time"
            raise ValueError(f"train.swap=random and train.consistency_weight need a task with swap_fields; {why}")
        if train.swap in (None, "both") and self.orders == 1:
            train.swap = "none"
        if self.trains and train.layout != "padded" and self.model.attn_implementation in ("eager", "sdpa"):
            raise ValueError(
                f"model.attn_implementation={self.model.attn_implementation} would let packed rows attend to each "
                "other; set train.layout=padded or model.attn_implementation=auto"
            )
        if words and set(words) != set(self.answers):
            raise ValueError(
                f"model.label_words names {sorted(words)}; it must name each "
                f"{'answer' if self.by_label else 'class'}: {list(self.answers)}"
            )
        if len(different) < sum(map(len, words.values())):
            raise ValueError(f"model.label_words {words} gives two classes the same word, or one class a word twice")
        if not self.model.head_bias and (self.model.readout, self.model.head) != ("head", "linear"):
            raise ValueError(
                f"model.head_bias=false is for model.readout=head with model.head=linear; these are "
                f"{self.model.readout} and {self.model.head}"
            )
        if not self._reads("train") and self.model.lora not in (None, Lora()):
            raise ValueError(f"model.lora changes nothing: approach={self.approach} trains no adapters; remove it")
        if not self.trains:
            self.model.lora = None
        if self.trains_all and self.model.quantization != "none":
            raise ValueError(
                f"model.quantization={self.model.quantization} freezes the base weights, and model.lora=null trains no "
                "adapters: only the head would be trained; set model.quantization=none or model.lora={}"
            )
        if train.distill.scores and task.multi_label:
            raise ValueError(
                "train.distill needs probabilities that sum to 1; the task is multi_label, with a probability for each "
                "label"
            )

    def _check_sides(self) -> None:
        """What a reward for each side needs."""
        model, train, task = self.model, self.train, self.task
        if not model.one_sided:
            if train.center_rewards_coefficient is not None:
                raise ValueError(
                    f"train.center_rewards_coefficient changes nothing with model.readout={model.readout}; remove it"
                )
            return
        if task.swap_fields is None or len(task.classes) > 3:
            raise ValueError(
                f"model.readout=reward scores two sides that win or tie, and the task {task.name} has "
                f"swap_fields {task.swap_fields} and {len(task.classes)} classes; set model.readout=head"
            )
        if model.tie_model and len(task.classes) == 2:
            raise ValueError(
                f"model.tie_model={model.tie_model} needs a class for ties, and the task {task.name} has only "
                f"{list(task.classes)}; remove it"
            )
        self._share_text("both sides")

    def _share_text(self, branches: str) -> None:
        """Lay out what a row's branches begin with once; only the layout `shared` does."""
        train = self.train
        if self._reads("train") and train.layout == "packed":
            train.layout = "shared"
        if train.layout == "padded" or self.predict.layout not in ("auto", "shared"):
            raise ValueError(
                f"model.readout={self.model.readout} computes a row's text once for {branches}: set "
                "train.layout=shared and predict.layout=auto"
            )

    def _check_labels(self) -> None:
        """What a yes or no for each label needs."""
        if not self.by_label:
            return
        if self.rationale:
            raise ValueError(
                f"prompt.rationale={self.rationale} is written before one label word, and the task {self.task.name} is "
                "multi_label; set prompt.rationale=0"
            )
        self._share_text("all labels")

    def _check_readout(self) -> None:
        model, train = self.model, self.train
        if model.readout != "label_tokens" and not self.trains and self._reads("model"):
            why = "train.max_steps=0" if self._reads("train") else f"approach={self.approach}"
            raise ValueError(
                f"{why} leaves the head of model.readout={model.readout} at random; set model.readout=label_tokens"
            )
        if model.readout == "label_tokens":
            if train.head_learning_rate is not None:
                raise ValueError(
                    f"train.head_learning_rate={train.head_learning_rate} changes nothing: model.readout=label_tokens "
                    "has no trained head"
                )
            if model.label_scoring == "joint" and self.trains_all:
                raise ValueError(
                    "model.label_scoring=joint reads the base's LM head, and model.lora=null trains the base away from "
                    "it; set model.label_scoring=trie or model.lora={}"
                )
        elif train.loss == "vocabulary":
            raise ValueError(
                f"train.loss=vocabulary scores words, and model.readout={model.readout} gives none; set "
                "model.readout=label_tokens"
            )
