"""The approach `finetune`, as everything outside of this room sees it; functions import what needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pairclf.approaches.language_model import LanguageModelApproach
from pairclf.approaches.protocol import Process
from pairclf.config import SECTIONS, Config
from pairclf.run import Run

if TYPE_CHECKING:
    from pairclf.approaches.finetune.trainer import FinetuneTrainer


class FinetuneApproach(LanguageModelApproach):
    """A language model with a head, trained whole or through adapters."""

    sections = frozenset(SECTIONS["finetune"])

    def check(self, config: Config) -> None:
        from pairclf.approaches.finetune.monitor import check_trackers

        check_trackers(config)

    def start(self, config: Config) -> Process:
        from pairclf.approaches.finetune.distributed import check_settings, make_accelerator

        accelerator = make_accelerator(config)
        check_settings(config, accelerator)
        return Process(accelerator.is_main_process, accelerator.main_process_first, accelerator)

    def trainer(self, run: Run, process: Process) -> FinetuneTrainer:
        from pairclf.approaches.finetune.trainer import FinetuneTrainer

        return FinetuneTrainer(run, process.handle)
