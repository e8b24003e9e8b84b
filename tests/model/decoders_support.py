"""Every decoder and encoder that the installed transformers know, built tiny, and how its rows score in each layout."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from models_support import logits_of
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pairclf.config import resolve
from pairclf.errors import ModelError
from pairclf.inputs.sequences import Item
from pairclf.model.engine import Classifier, build
from pairclf.model.families import FAMILIES
from pairclf.model.layouts import BATCH_LAYOUTS, padded
from pairclf.model.lm_head import afterwards, lm_head_of

DECODERS, ENCODERS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
VOCABULARY, LAYERS, WINDOW = 96, 4, 4

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
SIZES: dict[str, int] = {
    r"(vocab_size|vocab_size_per_layer_input)": VOCABULARY,
    r"(pad|bos|eos|sep|cls|decoder_start)_token_id": 0,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length)": 128,
    r"original_max_position_embeddings": 64,
    r"(hidden_size|n_embd|d_model|dim|embed_dim|emb_dim|embedding_size|word_embed_proj_dim|model_dim|lru_width)": 32,
    r"(hidden_size_per_layer_input|moe_latent_size)": 16,
    "|".join((*LAYER_COUNTS, "num_decoder_layers")): LAYERS,
    r"(num_attention_heads|n_head|n_heads|num_heads|(decoder|encoder)_attention_heads|swa_num_attention_heads)": 4,
    r"(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|swa_num_key_value_heads|swa_num_kv_heads)": 2,
    r"num_global_key_value_heads": 2,
    r"(head_dim|attention_head_dim|v_head_dim|d_kv|kv_channels|swa_head_dim|swa_v_head_dim|global_head_dim)": 8,
    r"(kv_lora_rank|q_lora_rank|o_lora_rank|laurel_rank|altup_rank|qk_head_dim)": 8,
    r"(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)": 4,
    r"(\w*intermediate_size\w*|ffn_dim|ffn_hidden_size|n_inner|d_ff|decoder_ffn_dim|encoder_ffn_dim)": 24,
    r"(num_local_experts|n_routed_experts|num_experts|moe_num_experts|num_moe_experts)": 4,
    r"(num_experts_per_tok|num_experts_per_token|top_k_experts|moe_top_k|moe_k|topk|moe_topk)": 2,
    r"(n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts|first_k_dense_replace)": 1,
    r"(num_dense_layers|num_nextn_predict_layers|zero_expert_num)": 1,
    r"num_kv_shared_layers": 0,
    r"(sliding_window|attention_window_size|local_attention|sliding_window_size|window_size|swa_window_size)": WINDOW,
    r"attention_chunk_size": 4,
}
"""Settings by their whole names, and what they become where a config has numbers there."""

ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(ALTERNATING)}
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 8},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8, "layer_types": ALTERNATING},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What some need besides, by `model_type`."""


def shrunk(settings: Any) -> Any:
    """The same config, and those within it, with small sizes; with windows where it knows any."""
    known = settings.to_dict()
    layers = next((count for name in LAYER_COUNTS if isinstance(count := known.get(name), int)), None)
    changed: dict[str, Any] = {}
    for name, value in known.items():
        within = getattr(settings, name, None) if isinstance(value, dict) else None
        if isinstance(within, PreTrainedConfig):
            changed[name] = shrunk(within)
        elif isinstance(value, list) and layers is not None and len(value) == layers > LAYERS:
            changed[name] = _shortened(value)
        elif isinstance(value, int) and not isinstance(value, bool) and (small := _small(name)) is not None:
            changed[name] = small
    if "sliding_window" in known:
        changed["sliding_window"] = WINDOW
        if set(known.get("layer_types") or []) == {"full_attention"}:
            changed["layer_types"] = ALTERNATING
    if "qk_rope_head_dim" in changed:  # of it and `qk_nope_head_dim` the config makes the others
        changed |= {"head_dim": 4, "qk_head_dim": 8, "num_key_value_heads": 4}
    changed |= {"use_sliding_window": True, "max_window_layers": 2, "per_layer_config": {}}
    made = {name: value for name, value in changed.items() if name in known}
    return type(settings)(**{**made, **OTHERS.get(settings.model_type, {})})


def _small(name: str) -> int | None:
    return next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)


def _shortened(kinds: list[Any]) -> list[Any]:
    """Four entries, with each kind of the list among them."""
    different = [kind for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    return [different[index % len(different)] for index in range(LAYERS)]


def tiny_decoder(kind: str, folder: Path) -> None:
    """Random weights in `folder`, so large that every token that is seen moves the states of those that see it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(shrunk(CONFIG_MAPPING[kind]()))
    random = torch.Generator().manual_seed(0)
    for name, one in model.named_parameters():
        if one.ndim > 1:
            one.data.normal_(std=1.0 if "embed" in name else one.shape[-1] ** -0.5, generator=random)
        else:
            one.data.add_(torch.randn(one.shape, generator=random) * 0.1)
    model.save_pretrained(folder)


def lm_difference(kind: str) -> float | None:
    """How far the logits of all tokens are from those of the LM itself; None: it is refused, or not built."""
    with TemporaryDirectory() as folder, torch.no_grad():
        try:
            settings = shrunk(CONFIG_MAPPING[kind]())
            for cap in {"final_logit_softcapping", "logits_soft_cap"} & settings.to_dict().keys():
                setattr(settings, cap, 3.0)
            lm = AutoModelForCausalLM.from_config(settings).float().eval()
            random = torch.Generator().manual_seed(0)
            for weight in lm.parameters():
                weight.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3, generator=random)
            ids = torch.tensor([[5, 9, 33, 20, 7]])
            lm.save_pretrained(folder)
            expected, backbone = lm(ids).logits[:, -1], AutoModel.from_pretrained(folder).eval()
            state = backbone(ids).last_hidden_state[:, -1]
            weight, bias = lm_head_of(folder, backbone, "a test").rows(range(VOCABULARY))
        except Exception:  # noqa: BLE001 - whatever transformers raises for a config so small
            return None
        return float((afterwards(settings)(state @ weight.T + bias) - expected).abs().max())


def decoder_of(folder: Path, **model: object) -> Classifier:
    """A classifier on a base that `tiny_decoder` made; the same head whatever the base was asked for before."""
    settings = {"base": str(folder), "quantization": "none", "lora": None, "dtype": "float32", **model}
    config = resolve({"model": settings, "train": {"layout": "padded"}, "inputs": {"max_length": 64}})
    made = build(config, torch.device("cpu")).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(made.head.weight, std=0.2)  # type: ignore[arg-type]
    return made


def rows() -> list[Item]:
    """One row in two orders with a common start, and others of 1 to 24 tokens: more than a window."""
    random = np.random.default_rng(0)

    def text(tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(1, VOCABULARY, tokens, dtype=np.int32)

    start = text(18)
    told = [Item(0, order, np.concatenate([start, text(5 + 4 * order)])) for order in (0, 1)]
    return [*told, *(Item(1 + row, 0, text(tokens)) for row, tokens in enumerate((1, 7, 24, 3)))]


def verdicts(folder: Path) -> dict[str, str]:
    """Of each layout: "equal", "refused: ..." or "wrong by ...", against each row alone with eager attention.

    Raises:
        ModelError: the base is refused whatever the layout; with `model.attn_implementation=eager` too.
    """
    eager = decoder_of(folder, attn_implementation="eager")
    alone = torch.cat([logits_of(eager, padded([row])) for row in rows()])
    found = {"eager, padded": _verdict(eager, "padded", alone, trim=False)}
    try:
        chosen = decoder_of(folder)
    except ModelError as error:
        return {**found, "padded": f"refused: {error.what}"}
    for layout in ("padded", "packed", "shared"):
        found[layout] = _verdict(chosen, layout, alone, trim=False)
        if chosen.why_not(layout) is None and chosen.why_not_trim(layout) is None:
            found[f"{layout}, trimmed"] = _verdict(chosen, layout, alone, trim=True)
    return found


def _verdict(classifier: Classifier, layout: str, alone: torch.Tensor, *, trim: bool) -> str:
    if why := classifier.why_not(layout):
        return f"refused: {why}"
    apart = (logits_of(classifier, BATCH_LAYOUTS[layout].lay_out(rows()), trim=trim) - alone).abs().max()
    return "equal" if apart <= 1e-5 * max(1.0, float(alone.abs().max())) else f"wrong by {apart:.2g}"


def outcome(kind: str, family: str = "decoder") -> dict[str, str]:
    """`verdicts` of a model of the family; of one that can't be built, is of another or refused as a base, why."""
    with TemporaryDirectory() as folder:
        try:
            tiny_decoder(kind, Path(folder))
            settings = AutoConfig.from_pretrained(folder)
        except Exception as error:  # noqa: BLE001 - whatever transformers raises for a config so small
            return {"build": f"not built: {type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        if not FAMILIES[family].matches(settings):
            return {"base": "another family"}
        try:
            return verdicts(Path(folder))
        except ModelError as error:
            return {"base": f"refused: {error.what}".replace(folder, kind)}


def rendered(table: dict[str, dict[str, str]], family: str = "decoder") -> str:
    """The table as docs/decoders.md, or docs/encoders.md, has it."""
    asked = [kind for kind, found in table.items() if found.get("base") == "another family"]
    absent = {kind: found["build"] for kind, found in table.items() if "build" in found}
    rest = {kind: found for kind, found in table.items() if kind not in (*asked, *absent)}
    lines = [f"| `{kind}` | {' | '.join(_cells(found))} |" for kind, found in rest.items()]
    packed_too = sum(found.get("packed") == "equal" for found in rest.values())
    return "\n".join([
        f"transformers {transformers.__version__}: {len(table)} architectures, {len(table) - len(absent)} built, "
        f"{packed_too} equal in packed rows, {len(rest) - packed_too} refused packed, {len(asked)} no {family}s.",
        "",
        "| `model_type` | padded | packed | shared | last layer at the read tokens | why not |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
        f"No {family}s: {', '.join(asked)}.",
        "",
        "Not built so small, and measured when they are loaded as every other base:",
        "",
        *(f"- `{kind}`: {why.removeprefix('not built: ')}" for kind, why in absent.items()),
        "",
    ])  # fmt: skip


def _cells(found: dict[str, str]) -> list[str]:
    whole = [found.get(layout, found.get("base", found.get("padded", ""))) for layout in ("padded", "packed", "shared")]
    trimmed = found.get("packed, trimmed", "no")
    reason = next((one.removeprefix("refused: ") for one in whole if one != "equal"), "")
    return [*(one.split(":")[0] for one in whole), trimmed, reason.replace("|", "/")]
