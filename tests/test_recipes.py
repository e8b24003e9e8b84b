"""The winners' recipes: what makes each itself takes effect in what training starts from, and in what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from encoder_decoders_support import tiny_encoder_decoder
from safetensors.torch import load_file
from torch import Tensor

from pairclf.approaches.finetune import train as loop
from pairclf.approaches.finetune.distributed import make_accelerator
from pairclf.approaches.finetune.step import Examples, TrainState, make_examples
from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.examples import read_examples
from pairclf.config import Config, load_config, parse_yaml, resolve
from pairclf.data.identity import row_hashes
from pairclf.data.rows import to_rows
from pairclf.data.scores import scores_frame, write_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.demo.examples import write_example
from pairclf.errors import LeakError
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import load_base, load_tokenizer
from pairclf.model.engine import Classifier, build
from pairclf.model.inputs import open_inputs
from pairclf.model.layouts import BATCH_LAYOUTS
from pairclf.model.readout import LabelTokenHead, TwoLayerHead
from pairclf.run import Run as TrainedRun
from pairclf.run import labelled_rows
from pairclf.runs.fit import fit
from pairclf.scores.figures import Metric
from pairclf.scores.intervals import mean_of
from pairclf.task import LMSYS

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# What the tiny bases make necessary, beyond the sizes that all recipes share.
SIZES = {
    "public-gemma2-qlora": ["model.lora.first_layer=3"],  # of 6 layers
    "public-llama3-qlora": ["model.label_words.winner_tie=' t'"],  # their tokenizer has no ` tie`
    "label-tokens-llama3": ["model.label_words.winner_tie=' t'"],
    "lmsys-3rd": ["train.eval_steps=1", "train.early_stopping_patience=1"],
    "arxiv-2512.12677-head": ["train.eval_steps=1", "train.early_stopping_patience=1", "train.num_train_epochs=1"],
    "lmsys-1st": ["train.eval_steps=1", "train.num_train_epochs=1"],
}

ENCODERS = {"deberta-v3-large": "deberta-v2", "modernbert-large": "modernbert", "minilm-cpu": "bert"}
"""Recipes of encoders, none of which is in the package, and the architecture of each."""


@dataclass
class Run:
    """A recipe: what moves its weights, the head before the first step, and, where it was trained, what was left."""

    config: Config
    learner: TrainState
    first_head: dict[str, Tensor]
    bundle: Path | None = None

    @property
    def folder(self) -> Path:
        assert self.bundle is not None, "it was not trained"
        return self.bundle

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.learner.optimizer.optimizer
        return inner


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_lmsys(generate(32, seed=3), folder, n_test=8)
    return folder


def small(recipe: str, data: Path, output: Path, *more: str) -> Config:
    """The recipe with a base of its architecture from the package, on the 24 rows, in three steps."""
    base = load_config(FOLDER / f"{recipe}.yaml").model.base.lower()
    return load_config(
        FOLDER / f"{recipe}.yaml",
        [
            f"model.base=embedded:{'gemma2' if 'gemma' in base else 'llama'}-tiny",
            *(
                f"data.folder={data}",
                f"data.cache_dir={data}/tokens",
                f"output_dir={output}",
                "folds.n_splits=2",
                "folds.run=null",
            ),
            *("inputs.max_length=160", "train.max_steps=3", "train.global_batch_size=4", "train.logging_steps=1"),
            *SIZES.get(recipe, []),
            *more,
        ],
    )


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Start:
    """What the training of a recipe starts from, fold 0 held out."""

    def construct(recipe: str, *more: str) -> Run:
        config, _, builder, _ = open_inputs(small(recipe, data, tmp_path / recipe, *more))
        training, _ = TrainedRun(config).split(0)
        rows = to_rows(training, config.task)
        classifier = build(config, torch.device("cpu"))
        head = {name: weight.clone() for name, weight in classifier.head.state_dict().items()}
        examples = make_examples(rows, builder.encode(rows), config)
        return Run(config, loop.construct(config, examples, classifier, make_accelerator(config)), head)

    return construct


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, without_forecast: None) -> Start:
    """Train a recipe by `fit`, fold 0 held out; of the looks at it, the first is the best."""
    seen: list[tuple[TrainState, dict[str, Tensor]]] = []

    def construct(config: Config, examples: Examples, classifier: Classifier, accelerator: Any) -> TrainState:
        learner = original(config, examples, classifier, accelerator)
        seen.append((learner, {name: weight.clone() for name, weight in classifier.head.state_dict().items()}))
        return learner

    original = loop.construct
    monkeypatch.setattr(loop, "construct", construct)

    def run(recipe: str, *more: str) -> Run:
        looks = iter((1.0, 1.1, 1.2))
        monkeypatch.setitem(
            loop.METRICS, "log_loss", Metric(lambda judged: mean_of(0 * judged.weights + next(looks, 1.0)), "", -1)
        )
        config = small(recipe, data, tmp_path / f"run{len(seen)}", *more)
        bundle = fit(config, 0)
        return Run(config, *seen[-1], bundle)

    return run


@pytest.fixture(scope="module")
def teachers(data: Path) -> Callable[[int], str]:
    """The override that names two teachers' scores, of models that were trained on so many of the rows' prompts."""

    def write(seen: int) -> str:
        frame = labelled_rows(small("lmsys-2nd", data, data))
        drawn = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, len(frame)))
        paths = [data / f"{name}-{seen}.parquet" for name in ("llama3", "qwen2")]
        for path, values in zip(paths, drawn, strict=True):
            ids, hashes = frame["id"].to_list(), row_hashes(frame, LMSYS)
            write_scores(path, scores_frame(ids, values, LMSYS, 2, [path.stem], seen=seen, hashes=hashes))
        return f"train.distill.scores=[{', '.join(map(str, paths))}]"

    return write


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_what_is_theirs_and_has_a_folder_of_its_own(recipe: str) -> None:
    path = FOLDER / f"{recipe}.yaml"
    text = path.read_text(encoding="utf-8")
    assert "\n# theirs" in text
    assert "\n# ours" in text
    assert load_config(Path("configs/recipes", path.name)).output_dir == Path("runs/recipes", recipe)


def test_recipes_make_packages_of_different_names() -> None:
    names = [load_config(FOLDER / f"{recipe}.yaml").package.name for recipe in RECIPES]
    assert len(set(names)) == len(names)


def test_sources_of_the_second_place_can_be_uncommented() -> None:
    lines = (FOLDER / "lmsys-2nd.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("# data:")
    block = "\n".join(line[2:] for line in lines[start : lines.index("inputs:")])
    config = resolve({"task": "lmsys", **parse_yaml(block, "lmsys-2nd.yaml")})
    assert [source.train_only for source in config.data.sources] == [False, True, True]


# --- trained ---------------------------------------------------------------------------------------------------------


def test_first_place_learns_from_teachers_that_never_saw_the_row(
    train: Start, teachers: Callable[[int], str], tmp_path: Path
) -> None:
    taught, untaught = train("lmsys-1st", teachers(0)), train("lmsys-1st", "train.distill.scores=[]")
    assert len(taught.log) == len(untaught.log) == 6  # a line a step, a line a look
    assert taught.log[0]["loss"] != pytest.approx(untaught.log[0]["loss"], abs=0.01)
    for file in ("head.safetensors", "adapter/adapter_model.safetensors"):
        left, right = (load_file(run.folder / file) for run in (taught, untaught))
        assert any(not torch.equal(left[name], right[name]) for name in left)
    assert taught.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert not any(hasattr(weight, "quant_state") for weight in taught.learner.classifier.parameters())
    with pytest.raises(LeakError, match="trained on the very row"):
        train("lmsys-1st", teachers(1))


def test_third_place_has_rates_of_its_own_and_stops(train: Start) -> None:
    run = train("lmsys-3rd")
    peaks = {name: peak for group, peak in groups(run) for name in group}
    assert peaks["head.weight"] == pytest.approx(8e-7)
    assert {peak for name, peak in peaks.items() if "lora_" in name} == {8e-6}
    assert not any("gate_proj" in name for name in peaks)
    assert_eight_bits(run)
    assert_stopped(run)


@pytest.mark.thorough
def test_second_place_trains_the_embedding_without_padding(train: Start) -> None:
    run = train("lmsys-2nd")
    assert [line["padding"] for line in run.log] == [0, 0, 0]
    base = load_base("pairclf/embedded/gemma2-tiny", run.config.model, torch.float32, torch.device("cpu"))
    trained = dict(run.learner.classifier.backbone.named_parameters())
    assert not torch.equal(trained["embed_tokens.weight"], base.get_parameter("embed_tokens.weight"))


@pytest.mark.parametrize("recipe", ENCODERS)
def test_recipes_of_encoders_train_all_weights_and_lower_layers_slowly(
    start: Start, base_of: Callable[[str], Path], recipe: str
) -> None:
    run = start(recipe, f"model.base={base_of(ENCODERS[recipe])}")
    config = load_config(FOLDER / f"{recipe}.yaml")
    assert (run.config.model.pooling, run.config.train.orders) == ("first", 1)
    assert {name for name, _ in run.learner.classifier.named_parameters()} == run.learner.weights.keys()
    peaks = {name: peak for group, peak in groups(run) for name in group}
    lowest = next(peak for name, peak in peaks.items() if "word_embeddings" in name or "tok_embeddings" in name)
    assert lowest == pytest.approx(config.train.learning_rate * 0.9**2)  # 2 layers here
    assert peaks["head.weight"] == config.train.head_learning_rate
    packed = "topology" in BATCH_LAYOUTS[run.config.train.layout].lay_out([Item(0, 0, np.array([1, 2]))]).inputs
    assert packed == (recipe != "deberta-v3-large")


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", ENCODERS)
def test_recipes_of_encoders_train_and_verify(train: Start, base_of: Callable[[str], Path], recipe: str) -> None:
    run = train(recipe, f"model.base={base_of(ENCODERS[recipe])}")
    assert open_bundle(run.folder).manifest.weights == "whole"
    assert not torch.equal(load_file(run.folder / "head.safetensors")["weight"], run.first_head["weight"])


@pytest.mark.thorough
def test_public_llama_trains_its_head(train: Start) -> None:
    run = train("public-llama3-qlora")
    assert not torch.equal(load_file(run.folder / "head.safetensors")["weight"], run.first_head["weight"])


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", ["arxiv-2512.12677-instruction", "label-tokens-llama3", "reward-gemma"])
def test_recipes_of_other_readouts_train_and_verify(train: Start, recipe: str) -> None:
    run = train(recipe)
    labels = run.config.model.readout == "label_tokens"
    assert ("label_mass" in run.log[0]) == labels
    first, last = run.first_head["weight"], load_file(run.folder / "head.safetensors")["weight"]
    assert torch.equal(first, last) == labels, "label tokens are frozen, a reward is not"


@pytest.mark.parametrize(("recipe", "kind"), [("flan-t5-large", "t5_v1_1"), ("t5gemma", "t5gemma")])
def test_recipes_of_encoder_decoders_train_and_verify(train: Start, tmp_path: Path, recipe: str, kind: str) -> None:
    tiny_encoder_decoder(kind, base := tmp_path / "base")
    instruction = ["inputs.template.apply_chat_template=false"] if kind == "t5gemma" else []
    run = train(recipe, f"model.base={base}", "inputs.max_length=700", *instruction)
    first, last = run.first_head["weight"], load_file(run.folder / "head.safetensors")["weight"]
    assert torch.equal(first, last) == (run.config.model.readout == "label_tokens")
    adapted = {name.split(".")[2] for name in load_file(run.folder / "adapter" / "adapter_model.safetensors")}
    assert adapted == {"encoder", "decoder"}


def test_few_shot_recipe_scores_with_examples_and_verifies(data: Path, tmp_path: Path) -> None:
    of_rows = [f"data.folder={data}", f"data.cache_dir={data}/tokens", f"output_dir={tmp_path}", "folds.n_splits=2"]
    overrides = [*of_rows, "model.base=embedded:gemma2-tiny", "inputs.max_length=1600"]
    bundle = open_bundle(fit(load_config(FOLDER / "fewshot-gemma.yaml", overrides), 0))
    assert len(read_examples(bundle)) == 4
    assert bundle.manifest.weights == "base"
    assert {"log_loss", "label_mass"} <= bundle.manifest.metrics.keys()


def test_sentiment_recipe_trains_adapters_on_single_texts(tmp_path: Path, without_forecast: None) -> None:
    example = write_example("sentiment", tmp_path / "data", rows=30, test_rows=6)
    path = FOLDER / "wandb-qwen-sentiment.yaml"
    of_rows = [f"data.folder={example.parent}", f"output_dir={tmp_path / 'run'}", "folds.n_splits=2"]
    small = ["model.base=embedded:llama-tiny", "inputs.max_length=64", "train.max_steps=1", "train.global_batch_size=4"]
    assert load_config(path).train.lr_scheduler_type == "cosine"
    bundle = open_bundle(fit(load_config(path, [*of_rows, *small]), 0))
    adapter = json.loads((bundle.files.adapter / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (64, 64, 7)
    assert (bundle.config.model.quantization, bundle.config.orders) == ("nf4", 1)


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", ["lmsys-4th", "public-gemma2-qlora", "arxiv-2512.12677-head"])
def test_recipe_trains_with_states_of_eight_bits(train: Start, recipe: str) -> None:
    run = train(recipe)
    assert_eight_bits(run)
    if run.config.train.early_stopping_patience is not None:
        assert_stopped(run)


# --- what training starts from ---------------------------------------------------------------------------------------


def test_second_place_trains_all_weights_in_both_orders_of_a_row(start: Start) -> None:
    run = start("lmsys-2nd")
    assert isinstance(run.learner.classifier.head, TwoLayerHead)
    assert run.config.train.max_grad_norm is None
    assert {name for name, _ in run.learner.classifier.named_parameters()} == run.learner.weights.keys()
    assert run.config.train.orders == 2
    template = run.config.inputs.template
    assert template.round.index("{prompt}") < template.round.index("{response_a}")


def test_fourth_place_shows_rounds_and_has_its_shares_and_scale(start: Start) -> None:
    run = start("lmsys-4th")
    assert load_config(FOLDER / "lmsys-4th.yaml").folds.n_splits == 20
    assert run.config.inputs.budget_shares == {"prompt": 0.2, "response_a": 0.4, "response_b": 0.4}
    assert run.config.inputs.template.round.startswith("\n\n# Prompt\n{prompt}")
    adapter = run.learner.classifier.backbone.peft_config["default"]  # type: ignore[union-attr, index]
    assert (adapter.r, adapter.lora_alpha) == (64, 16)
    assert isinstance(run.optimizer, AdamW8bit)


def test_public_gemma_has_adapters_in_upper_layers_alone(start: Start) -> None:
    run = start("public-gemma2-qlora")
    assert load_config(FOLDER / "public-gemma2-qlora.yaml").model.lora.first_layer == 16  # type: ignore[union-attr]
    places = {tuple(name.split("layers.")[1].split(".")[::2][:2]) for name in run.learner.weights if "lora_" in name}
    assert places == {(str(layer), module) for layer in (3, 4, 5) for module in ("q_proj", "k_proj", "v_proj")}
    assert any(hasattr(weight, "quant_state") for weight in run.learner.classifier.parameters())  # NF4
    assert run.config.train.orders == 1
    assert run.config.predict.swap == "off"
    assert isinstance(run.optimizer, AdamW8bit)


def test_public_llama_starts_from_the_label_words(start: Start) -> None:
    run = start("public-llama3-qlora")
    embedding = run.learner.classifier.backbone.get_input_embeddings().weight  # type: ignore[operator]
    tokenizer = load_tokenizer("pairclf/embedded/llama-tiny")
    ids = [tokenizer(word)["input_ids"][-1] for word in (" a", " b", " t")]
    assert torch.equal(run.first_head["weight"], embedding[ids].float())
    layers = {name.split("layers.")[1].split(".")[0] for name in run.learner.weights if "lora_" in name}
    assert layers == set("012345")


def test_paper_has_a_head_on_all_linear_layers_and_stops(start: Start) -> None:
    run = start("arxiv-2512.12677-head")
    modules = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in run.learner.weights if "lora_" in name}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert load_config(FOLDER / "arxiv-2512.12677-head.yaml").train.global_batch_size == 8
    assert load_config(FOLDER / "arxiv-2512.12677-head.yaml").train.early_stopping_patience is not None
    assert isinstance(run.optimizer, AdamW8bit)


def groups(run: Run) -> list[tuple[list[str], float]]:
    """Names of the weights in each of the optimizer's groups, and its peak rate."""
    names = {id(weight): name for name, weight in run.learner.weights.items()}
    by_group = [[names[id(weight)] for weight in group["params"]] for group in run.optimizer.param_groups]
    return list(zip(by_group, run.learner.peaks, strict=True))


def assert_eight_bits(run: Run) -> None:
    """States of 8 bits; bitsandbytes leaves weights of fewer than 4,096 numbers at 32."""
    assert isinstance(run.optimizer, AdamW8bit)
    weights, state = run.learner.weights.values(), run.optimizer.state
    kinds = {(weight.numel() >= 4096, state[weight]["state1"].dtype) for weight in weights}
    assert kinds <= {(True, torch.uint8), (False, torch.float32)}
    assert (False, torch.float32) in kinds


def assert_stopped(run: Run) -> None:
    """The second look was no better than the first: two steps of three, and the first one's weights are kept."""
    assert [line["held_out_log_loss"] for line in run.log if "held_out_log_loss" in line] == pytest.approx([1.0, 1.1])
    assert max(line["step"] for line in run.log) == 2


def test_instruction_tuning_starts_from_the_lm_and_a_reward_from_one_order(start: Start) -> None:
    instruction, reward = start("arxiv-2512.12677-instruction"), start("reward-gemma")
    head = instruction.learner.classifier.head
    assert isinstance(head, LabelTokenHead)
    assert not [name for name in instruction.learner.weights if name.startswith("head.")]
    embedding = instruction.learner.classifier.backbone.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(head.weight, embedding[[37, 38, 39]].float())  # A, B, C
    assert reward.config.train.orders == 1
    assert reward.learner.weights.keys() >= {"head.weight", "head.tie"}
