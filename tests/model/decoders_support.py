"""Every decoder that the installed transformers know, built tiny: four layers, a hidden size of 32, windows of 4."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
LAYERS = 4
WINDOW = 4

LAYERS_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
SIZES: list[tuple[str, object]] = [
    (r"(vocab_size|vocab_size_per_layer_input|bigram_vocab_size)", VOCABULARY),
    (r"(pad_token_id|bos_token_id|eos_token_id|sep_token_id|cls_token_id|decoder_start_token_id)", 0),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length)", 128),
    (r"original_max_position_embeddings", 64),
    (r"(hidden_size|n_embd|d_model|dim|embed_dim|emb_dim|embedding_size|word_embed_proj_dim|model_dim|lru_width)", 32),
    (r"(hidden_size_per_layer_input|moe_latent_size)", 16),
    (r"(num_hidden_layers|n_layer|n_layers|num_layers|decoder_layers|encoder_layers|num_decoder_layers)", LAYERS),
    (r"(num_attention_heads|n_head|n_heads|num_heads|decoder_attention_heads|encoder_attention_heads)", 4),
    (r"(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", 2),
    (r"(swa_num_attention_heads)", 4),
    (r"(swa_num_key_value_heads|num_global_key_value_heads|swa_num_kv_heads)", 2),
    (r"(head_dim|attention_head_dim|v_head_dim|d_kv|kv_channels|swa_head_dim|swa_v_head_dim|global_head_dim)", 8),
    (r"(kv_lora_rank|q_lora_rank|o_lora_rank)", 8),
    (r"(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)", 4),
    (r"qk_head_dim", 8),
    (r"\w*intermediate_size\w*|ffn_dim|ffn_hidden_size|n_inner|d_ff|decoder_ffn_dim|encoder_ffn_dim", 24),
    (r"(num_local_experts|n_routed_experts|num_experts|moe_num_experts|num_moe_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|top_k_experts|moe_top_k|moe_k|topk|moe_topk)", 2),
    (r"(n_group|topk_group|num_expert_groups|n_shared_experts|num_shared_experts|num_expert_group)", 1),
    (r"(first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|zero_expert_num)", 1),
    (r"(num_kv_shared_layers)", 0),
    (r"(sliding_window|attention_window_size|local_attention|sliding_window_size|window_size|swa_window_size)", 4),
    (r"(attention_chunk_size)", 4),
    (r"(laurel_rank|altup_rank)", 8),
]
"""Settings by their names, whole, and what they become where a config has them and they are numbers."""



def shrunk(settings: Any) -> Any:
    """The same config with its sizes changed to small ones, those of the configs within it, and windows where it can."""
    known = settings.to_dict()
    layers = next((n for name in LAYERS_NAMES if isinstance(n := known.get(name), int)), None)
    changed: dict[str, Any] = {}
    for name, value in known.items():
        within = getattr(settings, name, None) if isinstance(value, dict) else None
        if isinstance(within, PreTrainedConfig):
            changed[name] = shrunk(within)
        elif isinstance(value, list) and layers is not None and len(value) == layers > LAYERS:
            changed[name] = shortened(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            changed |= {name: small for pattern, small in SIZES if re.fullmatch(pattern, name)}
    if "sliding_window" in known:
        changed["sliding_window"] = WINDOW
        if set(known.get("layer_types") or ["none"]) == {"full_attention"}:
            changed["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    if "qk_rope_head_dim" in changed:  # of it and `qk_nope_head_dim` the config makes the others
        changed |= {"head_dim": 4, "qk_head_dim": 8, "num_key_value_heads": 4}
    fixed = {"use_sliding_window": True, "max_window_layers": 2, "per_layer_config": {}}
    changed |= {name: value for name, value in fixed.items() if name in known}
    made = {name: value for name, value in changed.items() if name in known}
    return type(settings)(**{**made, **OTHERS.get(settings.model_type, {})})


def shortened(kinds: list[Any]) -> list[Any]:
    """Four entries, among which is each kind of the list, first ones first."""
    different = [kind for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    return [different[index % len(different)] for index in range(LAYERS)]


def tiny_decoder(kind: str, folder: Path) -> None:
    """Random weights in `folder`, so large that every token that is seen moves the states of those that see it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(shrunk(CONFIG_MAPPING[kind]()))
    random = torch.Generator().manual_seed(0)
    for name, one in model.named_parameters():
        if one.ndim > 1:
            one.data.normal_(std=one.shape[-1] ** -0.5 if "embed" not in name else 1.0, generator=random)
        else:
            one.data.add_(torch.randn(one.shape, generator=random) * 0.1)
    model.save_pretrained(folder)


DECODERS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "dots1": {"head_dim": 8, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "zaya": {"num_experts_per_tok": 1},
}
