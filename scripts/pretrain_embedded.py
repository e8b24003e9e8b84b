"""Make the embedded base models: an own byte-level BPE tokenizer, a tiny Gemma-2 and a tiny Llama, pretrained.

    python scripts/pretrain_embedded.py gemma2-tiny llama-tiny

Each model takes about ten minutes on two cores and lands in `pairclf/embedded/NAME` with its figures in
`pretraining.json`. One seed gives one model on one machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from pretraining_corpus import HEADINGS, VERDICT, corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pairclf.files import atomic_folder, write_json

CORPUS_SEED = 20_240_501  # of no arena that the demo or a test draws; a corpus stream has its own seeds besides
VOCABULARY = 2_048
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
TURNS = ["<start_of_turn>", "<end_of_turn>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
POSITIONS = 2_048
HELD_OUT = 500  # documents
REMARK_WEIGHT = 5.0  # in the loss: a few tokens of a document carry what a judge must know

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,  # all linear sizes are multiples of 64, NF4's block
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def gemma2() -> PreTrainedModel:
    """Gemma-2 with what sets it apart: soft-capped scores and logits, and a sliding window in every other layer."""
    config = Gemma2Config(**SHAPE, query_pre_attn_scalar=32, sliding_window=128, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"gemma2-tiny": gemma2, "llama-tiny": llama}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text round-trips, whatever its script."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *TURNS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = SPECIAL["bos_token"]  # stands before every document below, and so before every text
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=TURNS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def batches(documents: list[list[int]], tokens: int, random: Random) -> Iterator[torch.Tensor]:
    """Padded batches (B, T) of about `tokens` tokens, of documents alike in length, in random order."""
    order = sorted(range(len(documents)), key=lambda index: (len(documents[index]), random.random()))
    groups: list[list[int]] = [[]]
    for index in order:
        if groups[-1] and len(documents[index]) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(index)
    random.shuffle(groups)
    for group in groups:
        longest = max(len(documents[index]) for index in group)
        yield torch.tensor([documents[index] + [0] * (longest - len(documents[index])) for index in group])


def lm_loss(model: PreTrainedModel, ids: torch.Tensor, headings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token losses in nats over a right-padded batch (B, T), and their weights; both (B, T - 1).

    A document is `..., ###, heading, newline, remark`: the remark, two tokens behind one of `headings`, weighs more.
    """
    logits = model(ids[:, :-1], attention_mask=(ids[:, :-1] != 0).long(), use_cache=False).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weights = (ids[:, 1:] != 0).float()
    weights[:, 1:] *= 1 + (REMARK_WEIGHT - 1) * torch.isin(ids[:, :-2], headings)
    return losses, weights


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, documents: list[list[int]], headings: torch.Tensor) -> tuple[float, float]:
    """Mean loss in nats, of a token and of a remark."""
    model.eval()
    sums = torch.zeros(4)
    for ids in batches(documents, 8_192, Random(0)):
        losses, weights = lm_loss(model, ids, headings)
        for index, chosen in enumerate((weights > 0, weights > 1)):
            sums[2 * index : 2 * index + 2] += torch.stack([losses[chosen].sum(), chosen.sum()])
    model.train()
    return float(sums[0] / sums[1]), float(sums[2] / sums[3])


def pretrain(
    model: PreTrainedModel,
    documents: list[list[int]],
    held_out: list[list[int]],
    headings: torch.Tensor,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train in place, one pass over `documents`; figures of the run."""
    plan = list(batches(documents, args.tokens_per_step, Random(args.seed)))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=len(plan), pct_start=0.05, final_div_factor=100
    )
    started, cpu, seen = time.monotonic(), time.process_time(), 0
    for step, ids in enumerate(plan, 1):
        losses, weights = lm_loss(model, ids, headings)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += int((weights > 0).sum())
        if step % args.report_every == 0 or step == len(plan):
            elapsed = time.monotonic() - started
            token, remark = held_out_loss(model, held_out, headings)
            shown = f"loss {loss.item():.4f}  held out: token {token:.4f}, remark {remark:.4f}"
            pace = f"{seen / elapsed:,.0f} tokens/s  eta {elapsed / step * (len(plan) - step):.0f} s"
            print(f"step {step}/{len(plan)}  {shown}  {pace}", flush=True)
    token, remark = held_out_loss(model, held_out, headings)
    return {
        "steps": len(plan),
        "tokens": seen,
        "documents": len(documents),
        "held_out_loss": round(token, 4),
        "held_out_perplexity": round(math.exp(token), 3),
        "held_out_remark_loss": round(remark, 4),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
        "wall_minutes": round((time.monotonic() - started) / 60, 1),
        "threads": torch.get_num_threads(),
    }


def make(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    texts = list(corpus(args.documents + HELD_OUT, args.corpus_seed))
    tokenizer = train_tokenizer(texts[HELD_OUT : HELD_OUT + 20_000])
    encoded = tokenizer([tokenizer.bos_token + text for text in texts], add_special_tokens=False)["input_ids"]
    encoded = [ids[:POSITIONS] for ids in encoded]
    model = MODELS[name]()
    parameters = sum(p.numel() for p in model.parameters())
    mean = sum(map(len, encoded)) / len(encoded)
    print(f"{name}: {parameters:,} parameters, {len(encoded):,} documents of {mean:.0f} tokens", flush=True)
    words = [f" {heading}" for heading in (*HEADINGS, VERDICT)]
    headings = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"]).flatten()
    figures = pretrain(model, encoded[HELD_OUT:], encoded[:HELD_OUT], headings, args)
    with atomic_folder(args.out / name, known_by="pretraining.json") as folder:
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        made = {"parameters": parameters, "weights_bytes": size, "corpus_seed": args.corpus_seed, "seed": args.seed}
        write_json(folder / "pretraining.json", {**made, **figures})
    print(json.dumps({**made, **figures}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}; all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pairclf" / "embedded")
    parser.add_argument("--documents", type=int, default=60_000, help="documents of arena text, each seen once")
    parser.add_argument("--tokens-per-step", type=int, default=1_024, help="padded tokens in one batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--corpus-seed", type=int, default=CORPUS_SEED, help="of the text")
    parser.add_argument("--report-every", type=int, default=100, help="steps")
    args = parser.parse_args()
    for name in args.names or MODELS:
        make(name, args)


if __name__ == "__main__":
    main()
