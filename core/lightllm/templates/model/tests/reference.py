"""The model once more, for one sequence and in nothing but PyTorch, and a small random checkpoint of it."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 48, 6, 2, 96, 2
HEAD_DIM = HIDDEN // HEADS
EPS, THETA = 1e-5, 10_000.0


def write_checkpoint(folder: Path, vocabulary: int) -> dict[str, Tensor]:
    """config.json and model.safetensors; the tensors."""
    config = {
        "architectures": ["ExamplePluginForCausalLM"],
        "vocab_size": vocabulary,
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
        "embed.weight": (vocabulary, HIDDEN),
        "norm.weight": (HIDDEN,),
        "head.weight": (vocabulary, HIDDEN),
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
    """[tokens, vocabulary]; row i is about what follows token i."""
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
