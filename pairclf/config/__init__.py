"""The settings: type, unit, default and help of each, in one class per section of the YAML file.

YAML files, `key=value` overrides, `pairclf config` and the docs all derive from the sections below. Settings are called
as in transformers' `TrainingArguments`, PEFT's `LoraConfig` or scikit-learn where these have them. Unknown keys are
errors that name the nearest key, and all errors of a config are shown at once.
"""

from pairclf.config.classical import Classical
from pairclf.config.data import Data, Folds, Rules, Source, Submission, Unlabelled
from pairclf.config.dump import (
    BY_BASE,
    deciding_settings,
    describe_config,
    dump_config,
    flat_settings,
    setting_changes,
    settings_before,
)
from pairclf.config.inputs import Inputs, Template, Truncation
from pairclf.config.kaggle import Package
from pairclf.config.load import load_config, override, resolve, run_folder
from pairclf.config.model import Lora, Model
from pairclf.config.parse import MAX_YAML, parse_yaml
from pairclf.config.predict import Predict
from pairclf.config.prompt import Prompt
from pairclf.config.renamed import ELSEWHERE, RENAMED
from pairclf.config.section import Section, checked, settings
from pairclf.config.train import Distill, Train
from pairclf.config.tree import SECTIONS, Config
from pairclf.config.wording import PLACE

__all__ = [
    "BY_BASE", "ELSEWHERE", "MAX_YAML", "PLACE", "RENAMED", "SECTIONS", "Classical", "Config", "Data", "Distill",
    "Folds", "Inputs", "Lora", "Model", "Package", "Predict", "Prompt", "Rules", "Section", "Source", "Submission",
    "Template", "Train", "Truncation", "Unlabelled",
    "checked", "deciding_settings", "describe_config", "dump_config", "flat_settings",
    "load_config", "override", "parse_yaml", "resolve", "run_folder",
    "setting_changes", "settings", "settings_before",
]  # fmt: skip
