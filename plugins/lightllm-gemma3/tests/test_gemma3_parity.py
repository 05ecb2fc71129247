"""Log-probabilities are transformers', for tiny random checkpoints of every kind, as safetensors and as GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextModel,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from lightllm import ModelInfo
from lightllm.nn.layers import Make
from lightllm.testing import check_model
from lightllm_gemma3.config import complete
from lightllm_gemma3.model import Decoder

PLUGINS = ["lightllm_gemma3"]
BASE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "query_pre_attn_scalar": 31,
    "sliding_window": 9,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
ROPE = {
    "full_attention": LINEAR | {"rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# name -> fields of the config, fields to write into config.json by hand in place of those that say the same now
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "mqa-biases-layer-types": (
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        {},
    ),
    "mha-untied": ({"num_key_value_heads": 4, "tie_word_embeddings": False}, {}),
    "rope": ({"rope_parameters": ROPE}, {}),
    "softcaps": ({"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}, {}),
    "older": (
        {"sliding_window_pattern": 3},
        {
            "sliding_window_pattern": 3,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": LINEAR,
        },
    ),
}


def softcapped(module: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' own attention, given the cap: Gemma3Attention reads it from the config and forgets it."""
    return eager_attention_forward(module, *args, softcap=module.attn_logit_softcapping, **kwargs)


AttentionInterface.register("softcapped", softcapped)
AttentionMaskInterface.register("softcapped", eager_mask)


def randomised(model: Any) -> Any:
    """Norms, which begin as zeros, and biases as well as the rest."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.uniform_(-0.4, 0.4)
    return model.eval()


def causal_lm(**fields: Any) -> Any:
    torch.manual_seed(sum(map(ord, str(fields))))
    return randomised(Gemma3ForCausalLM(Gemma3TextConfig(**BASE | fields)))


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(BASE["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def reloaded(folder: Path, kind: Any = Gemma3ForCausalLM) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="softcapped").eval()


@pytest.mark.parametrize("case", CASES)
def test_safetensors(tmp_path: Path, case: str) -> None:
    fields, by_hand = CASES[case]
    causal_lm(**fields).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    if by_hand:
        config = json.loads((tmp_path / "config.json").read_text())
        for newer in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
            config.pop(newer, None)
        (tmp_path / "config.json").write_text(json.dumps(config | by_hand))
    check_model(tmp_path, reloaded(tmp_path), plugins=PLUGINS)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(1)
    text = {key: value for key, value in BASE.items() if not key.endswith("token_id")}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=2, bos_token_id=1)
    model = randomised(Gemma3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("language_model.model.", prefix): tensor for name, tensor in load_file(file).items()}
    for part in (prefix, "vision_tower.", "multi_modal_projector."):
        assert any(name.startswith(part) for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    check_model(tmp_path, model, plugins=PLUGINS)


def test_embeddings_are_scaled_and_normed_in_bfloat16_as_transformers_does_it() -> None:
    fields = BASE | {"hidden_size": 2560, "num_hidden_layers": 0, "layer_types": []}
    model = randomised(Gemma3TextModel(Gemma3TextConfig(**fields))).to(torch.bfloat16)
    info = complete(ModelInfo(path="", architecture="Gemma3ForCausalLM", config=fields))
    make = Make(dtype=torch.bfloat16, device="cpu", linear_method=lambda: pytest.fail("there is no linear layer"))
    decoder = Decoder(info, make)
    decoder.embed_tokens.weight.copy_(model.embed_tokens.weight)
    decoder.norm.load("weight", model.norm.weight, None)
    tokens = torch.arange(199)
    with torch.inference_mode():
        expected = model(tokens[None]).last_hidden_state[0]
        assert torch.equal(decoder(tokens, tokens, None), expected)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(file: Path, model: Any, **fields: Any) -> None:
    """As llama.cpp's converter does it. ``fields``: further metadata below ``gemma3``, dots written as __."""
    config = model.config
    writer = GGUFWriter(file, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"gemma3.{key.replace('__', '.')}", value)
    tokens = [f"w{i}" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_eos_token_id(2)
    table = get_tensor_name_map(MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs != "lm_head.weight":
            values = tensor + 1 if theirs.endswith("norm.weight") else tensor
            writer.add_tensor(table.get_name(theirs, try_suffixes=(".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SLIDING = {"attention__sliding_window": 9}
# name -> fields of the config, fields of the file that say the same
GGUF_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every-sixth": ({"sliding_window_pattern": 6, "num_hidden_layers": 6, "query_pre_attn_scalar": 20}, SLIDING),
    "every-second-and-scaling": (
        {"query_pre_attn_scalar": 20, "rope_parameters": ROPE, "final_logit_softcapping": 2.0},
        SLIDING | {
            "attention__sliding_window_pattern": 2, "rope__freq_base_swa": 2e4, "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0, "final_logit_softcapping": 2.0,
        },
    ),
    "named-layers": (
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        SLIDING | {"attention__sliding_window_pattern": [False, True, True], "attention__scale": 31**-0.5},
    ),
    "no-window": ({"sliding_window_pattern": 1, "query_pre_attn_scalar": 20}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf(tmp_path: Path, case: str) -> None:
    fields, said = GGUF_CASES[case]
    model = causal_lm(**fields)
    model.set_attn_implementation("softcapped")
    write_gguf(tmp_path / "tiny.gguf", model, **said)
    check_model(tmp_path / "tiny.gguf", model, plugins=PLUGINS)
