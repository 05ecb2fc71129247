"""GGUF files: header, config, weights and tokenizer, each against somebody else's reading of the same file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from ggufs import AWKWARD, TEXTS, random_blocks, trained_bpe, write_blocks, write_model, write_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.gguf.dequant import dequantize as transformers_dequantize
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lightllm import ModelInfo, ModelRecord, UserError, hookimpl
from lightllm.assemble import open_checkpoint
from lightllm.nn.rope import Rope
from lightllm.plugins import Plugins
from lightllm.selection import adapters, model_record
from lightllm_builtin.gguf import matches
from lightllm_builtin.gguf.checkpoint import GGUFCheckpoint
from lightllm_builtin.gguf.header import Header, read_header
from lightllm_builtin.gguf.weights import GGUFWeights, read_tensor

Kind = GGMLQuantizationType
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def llama(**fields: Any) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**BASE | fields)))


def qwen2(**fields: Any) -> Qwen2ForCausalLM:
    return randomised(Qwen2ForCausalLM(Qwen2Config(**BASE | fields)))


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


PLUGINS = Plugins.discover()
ADAPTERS = adapters(PLUGINS, PLUGINS.find("weight_formats", "gguf"))


def checkpoint_of(file: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(file, ADAPTERS)


def weights_of(file: Path) -> GGUFWeights:
    return GGUFWeights(file, ModelInfo(path="", architecture="", config={}), ADAPTERS)


def tensors_of(file: Path, model: Any) -> dict[str, Tensor]:
    return dict(weights_of(file).tensors(list(model.state_dict())))


def info_of(file: Path) -> ModelInfo:
    return checkpoint_of(file).info()


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def test_a_file_or_a_folder_of_one_matches(tmp_path: Path) -> None:
    assert matches(tmp_path / "absent") == "no *.gguf"
    assert matches(tmp_path) == "no *.gguf"
    (tmp_path / "a.gguf").touch()
    assert matches(tmp_path) is None and matches(tmp_path / "a.gguf") is None
    (tmp_path / "b.gguf").touch()
    assert matches(tmp_path) == "2 .gguf files: name one of them"
    (tmp_path / "c.txt").touch()
    assert matches(tmp_path / "c.txt") == "not a .gguf file"


def test_a_folder_of_one_file_is_read_as_that_file(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", llama())
    assert info_of(tmp_path) == info_of(tmp_path / "m.gguf")


# ---------------------------------------------------------------------------------------------------------------------
# Header


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, "llama")
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 1.5e-5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 漢字 😀")
    writer.add_string("nothing", "")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "", "漢"])
    writer.add_array("floats", [0.5, -0.25])
    writer.add_custom_alignment(64)
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    writer.add_tensor("three", np.zeros((2, 3, 34), np.uint8), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header, reference = read_header(file), GGUFReader(file)
    expected = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert [(t.name, t.offset, t.nbytes, t.type) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes, t.tensor_type) for t in reference.tensors
    ]
    assert [t.shape for t in header.tensors] == [tuple(int(d) for d in reversed(t.shape)) for t in reference.tensors]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tokens, merges = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), 300)
    write_vocabulary(file, "gpt2", tokens, merges=merges, pre="gpt-2", bos_token_id=0)
    return file.read_bytes()


def read_all(file: Path) -> None:
    checkpoint = checkpoint_of(file)
    checkpoint.info()
    checkpoint.tokenizer()
    dict(weights_of(file).tensors(()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_off_anywhere_is_one_clear_error(small: bytes, tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(small[: data.draw(st.integers(0, len(small) - 1))])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        read_all(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_one_clear_error_if_any(small: bytes, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 600) | st.integers(0, len(small) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damaged)
    try:
        read_header(file)
    except UserError as error:
        assert "damaged.gguf" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
    ],
)
def test_what_is_no_gguf_file_of_ours_says_so(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=said):
        info_of(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Config


def test_config_says_in_hugging_face_terms_what_the_model_was(tmp_path: Path) -> None:
    model = qwen2(
        tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    write_model(tmp_path / "m.gguf", model)
    info = info_of(tmp_path)
    assert info.architecture == "Qwen2ForCausalLM"
    for key in (*BASE, "tie_word_embeddings", "model_type"):
        assert info.config[key] == getattr(model.config, key), key
    assert info.config["rope_theta"] == 5e5
    assert info.config["rms_norm_eps"] == pytest.approx(1e-5)


@pytest.mark.parametrize("field", ["attention.key_length", "rope.dimension_count"])
def test_a_head_dim_of_its_own(tmp_path: Path, field: str) -> None:
    model = llama(head_dim=32)
    write_model(tmp_path / "m.gguf", model, fields={field: 32})
    assert info_of(tmp_path).config["head_dim"] == 32
    check_tensors(tensors_of(tmp_path / "m.gguf", model), model)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"attention.sliding_window": 32}, "MistralForCausalLM"),
        ({"expert_count": 8}, "MixtralForCausalLM"),
        ({"expert_count": 0}, "LlamaForCausalLM"),
    ],
)
def test_mistrals_and_mixtrals_files_call_themselves_llama(
    tmp_path: Path, fields: dict[str, Any], architecture: str
) -> None:
    write_model(tmp_path / "m.gguf", llama(), fields=fields)
    info = info_of(tmp_path)
    assert info.architecture == architecture == info.config["architectures"][0]
    assert info.get("sliding_window") == fields.get("attention.sliding_window")


def test_an_architecture_we_do_not_know_goes_by_its_own_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert info_of(tmp_path).architecture == "mamba"


class Reversed:
    """`lightllm_builtin.gguf.adapter.Adapter` of a model plugin: its files hold every tensor the other way round."""

    def __init__(self, file: Header) -> None:
        self.file = file

    def config(self) -> dict[str, Any]:
        depth = self.file.field("ssm.state_size")
        return {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": depth, "hidden_size": 7}

    def tensor(self, name: str, values: Tensor) -> Tensor:
        return values.flip(0) if name == "token_embd.weight" else values


def test_a_model_plugins_adapter_says_what_its_files_mean(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, "mamba")
    writer.add_block_count(1)
    writer.add_embedding_length(4)
    writer.add_ssm_state_size(5)
    table = np.arange(8, dtype=np.float32).reshape(2, 4)
    writer.add_tensor("token_embd.weight", table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    record = ModelRecord(
        name="mamba",
        target=f"{__name__}:Reversed",
        architectures=("MambaForCausalLM",),
        adapters={"gguf/mamba": f"{__name__}:Reversed"},
    )
    plugin = ModuleType("mamba_plugin")
    vars(plugin)["lightllm_models"] = hookimpl(specname="lightllm_models")(lambda: [record])
    plugins = Plugins.discover(extra=[("mamba", plugin)])
    provided, _, info = open_checkpoint(plugins, file)
    assert info.architecture == "MambaForCausalLM"
    assert info.config["state_size"] == 5
    assert info.config["hidden_size"] == 7  # the adapter's word goes before the file's
    tensors = dict(
        plugins.load(provided)(file, info, adapters(plugins, provided)).tensors(["backbone.embeddings.weight"])
    )
    assert torch.equal(tensors["backbone.embeddings.weight"], torch.from_numpy(table[::-1].copy()))

    _, _, unadapted = open_checkpoint(PLUGINS, file)
    with pytest.raises(UserError, match="no model plugin serves the architecture 'mamba'"):
        model_record(PLUGINS, unadapted)


def test_a_value_per_layer_is_taken_where_all_agree(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", llama(), fields={"attention.sliding_window": [7, 7]})
    assert info_of(tmp_path).config["sliding_window"] == 7
    write_model(tmp_path / "m.gguf", llama(), fields={"attention.sliding_window": [7, 8]})
    with pytest.raises(UserError, match="sliding_window differs from layer to layer"):
        info_of(tmp_path)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, fields: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    write_model(tmp_path / "m.gguf", llama(), fields=fields)
    assert info_of(tmp_path).get("rope_scaling") == scaling


def test_llama3s_factors_give_the_frequencies_of_transformers(tmp_path: Path) -> None:
    scaled = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    plain = llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    expected = scaled.model.rotary_emb.inv_freq
    factors = (plain.model.rotary_emb.inv_freq / expected).numpy()
    assert factors.max() == pytest.approx(8.0) and factors.min() == pytest.approx(1.0)
    write_model(tmp_path / "m.gguf", scaled, extra={"rope_freqs.weight": factors})
    rope = Rope(info_of(tmp_path), 16, torch.device("cpu"))
    torch.testing.assert_close(rope.frequencies, expected)
    assert tensors_of(tmp_path / "m.gguf", scaled).keys() == scaled.state_dict().keys()


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def check_tensors(found: dict[str, Tensor], model: Any) -> None:
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "model",
    [
        llama(),
        llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        llama(num_key_value_heads=1),
        qwen2(),
    ],
    ids=["llama", "llama-tied-biases", "llama-mqa", "qwen2"],
)
def test_weights_come_back_under_their_names_and_in_their_order(tmp_path: Path, model: Any) -> None:
    file = tmp_path / "m.gguf"
    write_model(file, model)
    check_tensors(tensors_of(file, model), model)
    config = info_of(file).config
    if model.config.model_type == "llama":
        assert (config["attention_bias"], config["mlp_bias"]) == (model.config.attention_bias, model.config.mlp_bias)


@pytest.mark.parametrize("model", [llama(), qwen2()], ids=["llama", "qwen2"])
def test_weights_are_those_transformers_reads_from_the_file(tmp_path: Path, model: Any) -> None:
    file = tmp_path / "m.gguf"
    kinds = {name: Kind.Q8_0 for name in model.state_dict() if name.endswith("proj.weight")}
    write_model(file, model, kinds=kinds)
    reference = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    found = tensors_of(file, model)
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda k: k.name
)
def test_quantized_blocks_mean_what_transformers_says(tmp_path: Path, kind: Kind) -> None:
    raw = random_blocks(kind, 3, 512)
    write_blocks(tmp_path / "m.gguf", kind, raw)
    (tensor,) = read_header(tmp_path / "m.gguf").tensors
    expected = transformers_dequantize(torch.from_numpy(raw).flatten(), int(kind)).reshape(3, 512)
    found = read_tensor(tmp_path / "m.gguf", tensor)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Kind.F32, 0.0),
        (Kind.F16, 2e-3),
        (Kind.BF16, 2e-2),
        (Kind.Q8_0, 0.03),
        (Kind.Q5_0, 0.3),
        (Kind.Q4_1, 0.4),
        (Kind.Q4_0, 0.6),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_quantized_weights_stay_near_the_original(tmp_path: Path, kind: Kind, error: float) -> None:
    model = llama()
    write_model(tmp_path / "m.gguf", model, kinds={n: kind for n in model.state_dict() if n.endswith("proj.weight")})
    for name, tensor in tensors_of(tmp_path / "m.gguf", model).items():
        difference = (tensor - model.state_dict()[name]).abs().max().item()
        assert difference <= error, name
        assert error == 0 or not name.endswith("proj.weight") or difference > error / 100, name


def test_the_size_is_what_is_handed_out(tmp_path: Path) -> None:
    model = llama()
    write_model(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    weights = weights_of(tmp_path / "m.gguf")
    assert weights.nbytes() == sum(t.nbytes for _, t in weights.tensors(list(model.state_dict())))


def test_a_tensor_nobody_asked_for_is_handed_out_under_its_own_name(tmp_path: Path) -> None:
    model = llama()
    write_model(tmp_path / "m.gguf", model, extra={"blk.0.strange.weight": np.ones(8, np.float32)})
    assert "blk.0.strange.weight" in tensors_of(tmp_path / "m.gguf", model)


def test_a_type_that_cannot_be_read_is_named_with_its_tensor(tmp_path: Path) -> None:
    write_blocks(tmp_path / "m.gguf", Kind.Q8_K, np.zeros((2, 288 + 4), np.uint8))
    with pytest.raises(UserError, match=r"m\.gguf: tensor token_embd\.weight is of type Q8_K"):
        dict(weights_of(tmp_path).tensors(()))


def test_a_file_that_does_not_count_its_layers_says_so(tmp_path: Path) -> None:
    write_blocks(tmp_path / "m.gguf", Kind.F32, np.zeros((2, 32), np.float32), layers=None)
    with pytest.raises(UserError, match=r"m\.gguf.*llama\.block_count"):
        dict(weights_of(tmp_path).tensors(()))


def test_a_type_that_is_not_known_is_named_with_its_tensor(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_blocks(file, Kind.F32, np.zeros((2, 32), np.float32))
    name = b"token_embd.weight"
    content = bytearray(file.read_bytes())
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 999)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"token_embd\.weight is of type 999"):
        info_of(file)


@pytest.mark.slow
def test_the_demo_models_weights_are_those_transformers_reads(demo_model: Path) -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in (0, 17) for part in ("self_attn.q_proj", "mlp.down_proj")]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**info_of(demo_model).config))
    reference = load_gguf_checkpoint(str(demo_model), return_tensors=True, model_to_load=model)["tensors"]
    weights = weights_of(demo_model)
    found = {name: tensor for name, tensor in weights.tensors(list(reference)) if name in names or "embed" in name}
    assert found.keys() == {*names, "model.embed_tokens.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def reference_tokenizer(file: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer


def check_same(ours: Tokenizer, theirs: Tokenizer, texts: list[str], **options: Any) -> None:
    for text in texts:
        mine, other = ours.encode(text, **options), theirs.encode(text, **options)
        assert mine.ids == other.ids, (text, mine.tokens, other.tokens)
        for skip in (True, False):
            assert ours.decode(mine.ids, skip_special_tokens=skip) == theirs.decode(other.ids, skip_special_tokens=skip)


LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pre", ["gpt-2", "default", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "tekken"]
)
def test_byte_level_vocabularies_are_read_as_transformers_reads_them(tmp_path: Path, pre: str) -> None:
    # trained with no cut at all, merges go wherever the cut lets them: a wrong one shows
    tokens, merges = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokens = [*tokens, "<|end|>", "<think>"]
    types = {"<|end|>": TokenType.CONTROL, "<think>": TokenType.USER_DEFINED}
    file = tmp_path / "m.gguf"
    write_vocabulary(file, "gpt2", tokens, merges=merges, pre=pre, types=types, add_bos_token=False)
    texts = [*AWKWARD, "a<|end|>b <think>c</think>"]
    if pre == "qwen2":  # transformers forgets Qwen's normalization to NFC
        texts = [text for text in texts if "e\u0301" not in text]
    ours = checkpoint_of(file).tokenizer()
    # whole words apart: that transformers forgets it for Llama 3 shows only on words that merges do not reach
    check_same(ours, reference_tokenizer(file), texts)
    assert ours.decode(ours.encode("a<|end|>b<think>").ids) == "ab<think>"


def test_qwens_text_is_normalized(tmp_path: Path) -> None:
    tokens, merges = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, merges=merges, pre="qwen2")
    tokenizer = checkpoint_of(tmp_path).tokenizer()
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_llama3_takes_a_word_that_is_a_token_as_it_is(tmp_path: Path) -> None:
    tokens, merges = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokens = [*tokens, "unreachable"]
    write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, merges=merges, pre="llama-bpe")
    assert checkpoint_of(tmp_path).tokenizer().encode("unreachable").tokens == ["unreachable"]
    write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, merges=merges, pre="qwen2")
    assert len(checkpoint_of(tmp_path).tokenizer().encode("unreachable").tokens) > 1


def test_the_cut_of_llama3_is_its_own_tokenizers(tmp_path: Path) -> None:
    """Digits by threes, contractions, and line ends after symbols."""
    tokens, merges = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, merges=merges, pre="llama-bpe")
    cut = checkpoint_of(tmp_path).tokenizer().pre_tokenizer.pre_tokenize_str
    expected = pre_tokenizers.Split(Regex(LLAMA3_CUT), "isolated").pre_tokenize_str
    for text in AWKWARD:
        assert [place for _, place in cut(text)] == [place for _, place in expected(text)], text


def trained_sentencepiece(folder: Path, *user_defined: str, **options: Any) -> Any:
    spm = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(line.strip() for line in TEXTS) * 20, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "m"), vocab_size=600, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, user_defined_symbols=list(user_defined), character_coverage=0.98,
        split_digits=True, **options,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_file=str(folder / "m.model"))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained_sentencepiece(tmp_path_factory.mktemp("spm"), "[INST]")


@pytest.fixture(scope="module")
def gemmas_kind(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No space before a text; runs of spaces and line ends, and some tags, are pieces that never merge."""
    runs = ["▁" * i for i in range(2, 9)] + ["\n" * i for i in range(1, 6)] + ["\t"]
    return trained_sentencepiece(tmp_path_factory.mktemp("spm"), *runs, "<turn>", "</h1>", add_dummy_prefix=False)


def write_sentencepiece(file: Path, model: Any, **fields: Any) -> None:
    """As llama.cpp's converter does: types are sentencepiece's own, and what is user-defined has its spaces back."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    pieces = ModelProto.FromString(model.serialized_model_proto()).pieces
    tokens = [p.piece.replace("▁", " ") if p.type == TokenType.USER_DEFINED else p.piece for p in pieces]
    scores, types = [p.score for p in pieces], [p.type for p in pieces]
    write_vocabulary(
        file, "llama", tokens, scores=scores, types=types, bos_token_id=1, eos_token_id=2, unknown_token_id=0, **fields
    )


def test_sentencepieces_vocabulary_is_read_as_sentencepiece_reads_it(tmp_path: Path, sentencepiece_model: Any) -> None:
    write_sentencepiece(tmp_path / "m.gguf", sentencepiece_model)
    tokenizer = checkpoint_of(tmp_path).tokenizer()
    for text in AWKWARD:
        if not text:
            continue  # a prefix space alone: llama.cpp and sentencepiece add none
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == sentencepiece_model.encode(text), (text, tokenizer.encode(text).tokens)
        assert tokenizer.decode(ids) == text


def test_gemmas_kind_of_vocabulary_is_read_as_sentencepiece_reads_it(tmp_path: Path, gemmas_kind: Any) -> None:
    write_sentencepiece(tmp_path / "m.gguf", gemmas_kind, add_space_prefix=False)
    tokenizer = checkpoint_of(tmp_path).tokenizer()
    runs = ["a" + " " * i + "b" + "\n" * j + "c" for i in range(1, 20) for j in range(7)]
    for text in [*AWKWARD, *runs, "<turn>user\n  hi</h1> there\t\t x<turn>"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == gemmas_kind.encode(text), (text, tokenizer.encode(text).tokens)
        assert tokenizer.decode(ids) == text


def test_sentencepieces_texts_begin_with_bos_unless_the_file_says_no(tmp_path: Path, sentencepiece_model: Any) -> None:
    def framed(**fields: Any) -> list[str]:
        write_sentencepiece(tmp_path / "m.gguf", sentencepiece_model, **fields)
        tokens: list[str] = checkpoint_of(tmp_path).tokenizer().encode("the").tokens
        return tokens

    bare = framed(add_bos_token=False)
    assert framed() == ["<s>", *bare]
    assert framed(add_eos_token=True) == ["<s>", *bare, "</s>"]
    assert bare[0].startswith("▁") and not framed(add_bos_token=False, add_space_prefix=False)[0].startswith("▁")


def test_special_tokens_are_found_in_the_text_and_hidden_when_decoded(tmp_path: Path, sentencepiece_model: Any) -> None:
    write_sentencepiece(tmp_path / "m.gguf", sentencepiece_model)
    tokenizer = checkpoint_of(tmp_path).tokenizer()
    encoded = tokenizer.encode("<s>the</s>[INST]", add_special_tokens=False)
    assert encoded.tokens[0] == "<s>" and encoded.tokens[-2:] == ["</s>", "[INST]"]
    assert tokenizer.decode(encoded.ids) == "the[INST]"


@pytest.mark.parametrize(("pre", "bos"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_llama3_and_tekken_texts_begin_with_bos_unless_the_file_says_no(tmp_path: Path, pre: str, bos: bool) -> None:
    tokens, merges = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), 300)
    for fields, expected in [({}, bos), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]:
        write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, merges=merges, pre=pre, bos_token_id=7, **fields)
        assert (checkpoint_of(tmp_path).tokenizer().encode("a").ids[0] == 7) == expected


@pytest.mark.parametrize(
    ("tokens", "fields", "eos"),
    [
        (["a", "b"], {}, ()),
        (["a", "b"], {"eos_token_id": 1}, (1,)),
        (["a", "b", "c"], {"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 0}, (1, 2, 0)),
        (["a", "b"], {"eos_token_id": 1, "eot_token_id": 1}, (1,)),
        (["a", "b", "<|eot_id|>"], {"eos_token_id": 1}, (1, 2)),
        (["a", "<|im_end|>"], {"eos_token_id": 1}, (1,)),
        (["a", "b", "<|eot_id|>"], {"eos_token_id": 1, "eot_token_id": 0}, (1, 0)),
    ],
)
def test_every_token_that_ends_an_answer_is_an_eos(
    tmp_path: Path, tokens: list[str], fields: dict[str, int], eos: tuple[int, ...]
) -> None:
    types = {"<|eot_id|>": TokenType.CONTROL, "<|im_end|>": TokenType.CONTROL}
    write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, types=types, **fields)
    info = info_of(tmp_path)
    assert info.eos_token_ids() == eos
    assert info.eos_token == (tokens[eos[0]] if eos else None)


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("t5", {}, "'t5' is not supported"),
        ("gpt2", {"pre": "jais", "merges": ["a b"]}, "'jais'.*not supported"),
        ("gpt2", {"pre": "qwen2"}, "no merges"),
        ("gpt2", {"pre": "qwen2", "merges": ["a z"]}, "vocabulary cannot be read"),
        ("llama", {}, "0 scores"),
    ],
)
def test_a_vocabulary_that_cannot_be_read_says_why(
    tmp_path: Path, model: str, fields: dict[str, Any], said: str
) -> None:
    write_vocabulary(tmp_path / "m.gguf", model, ["a", "b", "ab"], **fields)
    with pytest.raises(UserError, match=rf"m\.gguf.*{said}"):
        checkpoint_of(tmp_path).tokenizer()


# ---------------------------------------------------------------------------------------------------------------------
# The demo model's


@pytest.fixture(scope="module")
def demo_reference(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model.parent, gguf_file=demo_model.name)


def test_the_demo_models_tokens_are_those_of_transformers(demo_model: Path, demo_reference: Any) -> None:
    ours = checkpoint_of(demo_model).tokenizer()
    # transformers forgets that SmolLM cuts digits one by one
    texts = [text for text in AWKWARD if not any(character.isnumeric() for character in text)]
    assert len(texts) > 15
    check_same(ours, demo_reference.backend_tokenizer, [*texts, "<|im_start|>user\nhi<|im_end|>\n"])


def test_the_demo_models_digits_are_tokens_of_their_own(demo_model: Path) -> None:
    tokenizer = checkpoint_of(demo_model).tokenizer()
    assert tokenizer.encode("x=12345").tokens[-5:] == ["1", "2", "3", "4", "5"]
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_demo_models_template_and_special_tokens_are_those_of_transformers(
    demo_model: Path, demo_reference: Any
) -> None:
    info = info_of(demo_model)
    assert info.chat_template == demo_reference.chat_template
    assert (info.bos_token, info.eos_token) == (demo_reference.bos_token, demo_reference.eos_token)
    assert info.eos_token_ids() == (demo_reference.eos_token_id,)
    json.dumps(info.config)  # crosses to other processes


def test_reading_the_demo_models_header_is_quick(demo_model: Path) -> None:
    import time

    def once() -> float:
        start = time.perf_counter()
        read_header(demo_model)
        return time.perf_counter() - start

    # 0.05 s; the gguf package's reader takes 2
    assert min(once() for _ in range(5)) < 0.4
