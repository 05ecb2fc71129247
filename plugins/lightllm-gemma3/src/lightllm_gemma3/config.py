"""config.json in one spelling: every field there, in the names of transformers 5, the text model's at the top."""

from __future__ import annotations

from typing import Any

import msgspec

from lightllm import ModelInfo, UserError

FULL, SLIDING = "full_attention", "sliding_attention"
# What transformers' Gemma3TextConfig takes where config.json is silent, as it is where it agrees.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
OF_THE_WHOLE = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
"""What a config of several models says at the top goes before what its text model's part says."""


def complete(info: ModelInfo) -> ModelInfo:
    """Raises UserError naming the field that is not supported."""
    whole, text = info.config, info.config.get("text_config") or {}
    top = {key: whole[key] for key in OF_THE_WHOLE if key in whole}
    config: dict[str, Any] = {"sliding_window": 4096, "eos_token_id": 1, **whole, **text, **top}
    config |= {key: default for key, default in DEFAULTS.items() if config.get(key) is None}
    config["layer_types"] = _layer_types(config)
    config["rope_parameters"] = _rope_parameters(config, info.path)
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"):
        config.pop(key, None)  # said above
    if reason := _unsupported(config):
        raise UserError(f"{info.path}: {reason} is not supported by Gemma 3")
    return msgspec.structs.replace(info, config=config)


def _layer_types(config: dict[str, Any]) -> list[str]:
    if config.get("layer_types") is not None:
        return list(config["layer_types"])
    period = config.get("sliding_window_pattern") or 6
    return [SLIDING if (i + 1) % period else FULL for i in range(config["num_hidden_layers"])]


def _rope_parameters(config: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Layer type -> its RoPE. Scaling in the older spelling is that of the full layers."""
    given = config.get("rope_parameters") or {}
    if given.keys() - {FULL, SLIDING}:
        raise UserError(f"{path}: rope_parameters has {', '.join(given)} where Gemma 3 has {FULL}, {SLIDING}")
    scaling = dict(config.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling["type"])
    return {
        FULL: {"rope_type": "default", "rope_theta": config["rope_theta"]} | (given.get(FULL) or {}) | scaling,
        SLIDING: {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]} | (given.get(SLIDING) or {}),
    }


def _unsupported(config: dict[str, Any]) -> str | None:
    kinds, layers = config["layer_types"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if config["use_bidirectional_attention"]:
        return "use_bidirectional_attention"
    if config["hidden_activation"] != "gelu_pytorch_tanh":
        return f"hidden_activation {config['hidden_activation']!r}"
    if unknown := set(kinds) - {FULL, SLIDING}:
        return f"layer_types {', '.join(map(repr, sorted(unknown)))}"
    if len(kinds) != layers:
        return f"layer_types of {len(kinds)} for num_hidden_layers {layers}"
    if SLIDING in kinds and not config["sliding_window"]:
        return f"sliding_window {config['sliding_window']!r}, where layers are {SLIDING},"
    if heads % kv_heads:
        return f"num_attention_heads {heads} for num_key_value_heads {kv_heads}"
    return None
