"""The approach `prompt`: a base that is asked for a label word, with examples before each row or none, untrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pairclf.approaches.language_model import LanguageModelApproach
from pairclf.approaches.protocol import Process, only_process
from pairclf.config import SECTIONS, Config
from pairclf.run import Run

if TYPE_CHECKING:
    from pairclf.approaches.prompt_trainer import PromptTrainer


class PromptApproach(LanguageModelApproach):
    """A base that says the label, without training."""

    sections = frozenset(SECTIONS["prompt"])

    def check(self, config: Config) -> None:
        """Everything is checked when the base's tokenizer is there."""

    def start(self, config: Config) -> Process:
        return only_process(config)

    def trainer(self, run: Run, process: Process) -> PromptTrainer:
        from pairclf.approaches.prompt_trainer import PromptTrainer

        return PromptTrainer(run)
