"""What the plugin declares, and config.json in all its spellings: as transformers reads it, or a clear error."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from transformers import Gemma3Config, Gemma3TextConfig

from lightllm import ModelInfo, UserError
from lightllm.testing import check_plugin
from lightllm_gemma3.config import DEFAULTS, complete
from lightllm_gemma3.gguf import Gemma3GGUF

SCALING = {"factor": 8.0, "rope_type": "linear"}
# As google published them, but for fields that say nothing of the decoder.
PUBLISHED_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
PUBLISHED_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": SCALING,
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
}


def completed(config: dict[str, Any]) -> dict[str, Any]:
    return complete(ModelInfo(path="tiny", architecture=config["architectures"][0], config=config)).config


def test_the_plugin_fulfils_its_contracts_and_declares_them_without_torch() -> None:
    check_plugin("lightllm_gemma3")
    code = "import lightllm_gemma3, lightllm_gemma3.gguf, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(
    "text",
    [
        PUBLISHED_1B,
        {"architectures": ["Gemma3ForCausalLM"]},
        PUBLISHED_1B | {"sliding_window_pattern": 4, "rope_scaling": SCALING, "rope_theta": 5e5},
        PUBLISHED_1B | {"layer_types": ["full_attention"] * 20 + ["sliding_attention"] * 6},
        PUBLISHED_1B | {"rope_parameters": {"full_attention": SCALING, "sliding_attention": {"rope_theta": 2e4}}},
        PUBLISHED_1B | {"final_logit_softcapping": 30.0, "tie_word_embeddings": False},
    ],
    ids=["1b", "silent", "older", "layer-types", "rope-parameters", "others"],
)
def test_every_field_is_what_transformers_makes_of_it(text: dict[str, Any]) -> None:
    check_fields(completed(text), Gemma3TextConfig(**text))


def check_fields(found: dict[str, Any], expected: Gemma3TextConfig) -> None:
    spelt_otherwise = {"rope_theta", "rope_local_base_freq"}
    for key in DEFAULTS.keys() - spelt_otherwise | {"layer_types", "sliding_window"}:
        assert found[key] == getattr(expected, key), key
    for kind in ("full_attention", "sliding_attention"):
        ours, theirs = found["rope_parameters"][kind], expected.rope_parameters[kind]
        assert {key: ours[key] for key in theirs} == theirs


def test_a_model_that_sees_is_read_as_its_text_model() -> None:
    found = completed(PUBLISHED_4B)
    check_fields(found, Gemma3Config(**PUBLISHED_4B).text_config)
    assert found["eos_token_id"] == [1, 106]
    assert found["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"layer_types": ["chunked_attention"] * 26}, "layer_types 'chunked_attention' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types of 1 for num_hidden_layers 26"),
        ({"sliding_window": None}, "sliding_window None"),
        ({"num_attention_heads": 9, "num_key_value_heads": 4}, "num_attention_heads 9 for num_key_value_heads 4"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
    ],
)
def test_a_field_that_is_not_supported_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^tiny: .*{said}"):
        completed(PUBLISHED_1B | fields)


class File:
    """The header of a GGUF file, as adapters see it."""

    def __init__(self, **fields: Any) -> None:
        self.metadata = {f"gemma3.{name.replace('__', '.')}": value for name, value in fields.items()}

    def field(self, name: str) -> Any:
        return self.metadata.get(f"gemma3.{name}")


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "head_dim", "expected"),
    [(26, 1152, 4, 256, 256), (34, 2560, 8, 256, 256), (48, 3840, 16, 256, 256), (62, 5376, 32, 128, 168)],
    ids=["1b", "4b", "12b", "27b"],
)
def test_a_gguf_files_scale_is_what_google_published_for_that_size(
    layers: int, hidden: int, heads: int, head_dim: int, expected: int
) -> None:
    file = File(
        block_count=layers, embedding_length=hidden, attention__head_count=heads, attention__key_length=head_dim
    )
    assert Gemma3GGUF(file).config()["query_pre_attn_scalar"] == expected
