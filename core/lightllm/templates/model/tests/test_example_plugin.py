import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightllm.testing import check_model, check_plugin, serve
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import example_plugin

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 48, 6, 2, 96, 2
HEAD_DIM = HIDDEN // HEADS
EPS, THETA = 1e-5, 10_000.0
VOCABULARY = 320  # more than the tokenizer has that is borrowed here


def write_checkpoint(folder: Path) -> dict[str, Tensor]:
    """config.json and a random model.safetensors; its tensors."""
    config = {
        "architectures": ["ExamplePluginForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (VOCABULARY, HIDDEN),
        "norm.weight": (HIDDEN,),
        "head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.norm.weight": (HIDDEN,),
            f"layers.{layer}.q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"layers.{layer}.k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"layers.{layer}.v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"layers.{layer}.out.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"layers.{layer}.up.weight": (INNER, HIDDEN),
            f"layers.{layer}.down.weight": (HIDDEN, INNER),
        }
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def logits(tensors: dict[str, Tensor], tokens: Sequence[int]) -> Tensor:
    """The model once more, for one sequence and in nothing but PyTorch: [tokens, vocabulary], row i of what follows
    token i."""
    x = tensors["embed.weight"][torch.tensor(tokens)]
    for layer in range(LAYERS):
        names = ("norm", "q", "k", "v", "out", "up", "down")
        weight = {name: tensors[f"layers.{layer}.{name}.weight"] for name in names}
        y = F.rms_norm(x, (HIDDEN,), weight["norm"], EPS)
        q = _rotated((y @ weight["q"].T).view(-1, HEADS, HEAD_DIM)).transpose(0, 1)
        k = _rotated((y @ weight["k"].T).view(-1, KV_HEADS, HEAD_DIM)).transpose(0, 1)
        v = (y @ weight["v"].T).view(-1, KV_HEADS, HEAD_DIM).transpose(0, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attended.transpose(0, 1).flatten(1) @ weight["out"].T + F.gelu(y @ weight["up"].T) @ weight["down"].T
    return F.rms_norm(x, (HIDDEN,), tensors["norm.weight"], EPS) @ tensors["head.weight"].T


def _rotated(x: Tensor) -> Tensor:
    """RoPE (Su et al., 2021) of [tokens, heads, head_dim]: halves as real and imaginary parts, turned by an angle."""
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(len(x))[:, None, None] * frequencies
    real, imaginary = x.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    return tmp_path


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_computes_what_the_reference_does(folder: Path) -> None:
    """However its work is batched, cached or interrupted."""
    tensors = write_checkpoint(folder)
    check_model(folder, lambda tokens: logits(tensors, tokens), plugins=[example_plugin.__name__])


def test_a_server_answers_with_it(folder: Path) -> None:
    tensors = write_checkpoint(folder)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    with serve([example_plugin.__name__], model=folder) as server:
        answer = server.complete(prompt, max_tokens=1, temperature=0, logprobs=0, ignore_eos=True)
    (found,) = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found == pytest.approx(logits(tensors, prompt)[-1].log_softmax(-1).max().item(), abs=1e-3)
