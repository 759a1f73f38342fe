"""A model folder with random weights, made in seconds: the shape of Qwen2.5-1.5B, or a tiny one of its kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mrl.reshard.families import tensor_shapes
from mrl.reshard.spec import ModelSpec, load_spec

_BLOCK = 10_000_019
"""Random numbers that weights repeat; no multiple of a row's length, so that rows differ."""
_STD = 0.02
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(kw_only=True, frozen=True)
class Shape:
    """What sets the size of a Qwen2."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    dtype: str


QWEN2_1_5B = Shape(
    name="1.5B-shaped Qwen2",
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    dtype="bfloat16",
)
TINY = Shape(
    name="tiny Qwen2",
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    dtype="float32",
)


def write_model(folder: Path, shape: Shape, *, max_length: int) -> ModelSpec:
    """Write config and weights, embeddings tied, to `folder`, which must not exist; returns the model's spec.

    Args:
        max_length: longest sequence, in tokens.
    """
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": shape.dtype,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    spec = load_spec(folder)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(_STD).to(_DTYPES[shape.dtype])
    weights, start = {}, 0
    for name, size in tensor_shapes(spec).items():
        weights[name] = torch.ones(size, dtype=block.dtype) if "norm" in name else _repeat(block, size, start)
        start = (start + weights[name].numel()) % _BLOCK
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return spec


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of that many tokens to a model's folder, in which each digit of a text is a token of its own."""
    # Imported here: it takes seconds, and training alone needs no tokenizer.
    from transformers import Qwen2Tokenizer

    special = ("<pad>", "<bos>", "<eos>")
    tokens = [*special, *"0123456789"]
    tokens += [f"w{index}" for index in range(vocab_size - len(tokens))]
    pad, bos, eos = special
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=None,
    )
    tokenizer.save_pretrained(folder)


def _repeat(block: Tensor, size: tuple[int, ...], start: int) -> Tensor:
    """A tensor of the size, filled with the block from `start` on, over and over."""
    result = torch.empty(size, dtype=block.dtype)
    flat, at = result.view(-1), 0
    while at < flat.numel():
        piece = block[start : start + flat.numel() - at]
        flat[at : at + len(piece)] = piece
        at, start = at + len(piece), 0
    return result


def flops_per_token(spec: ModelSpec, length: int) -> float:
    """Of a forward pass over sequences of `length` tokens, output layer included; a training step takes three times it.

    Two per weight of every matrix product, and four per element of queries times keys and of their product with the
    values, half of which a causal mask leaves.
    """
    query = spec.num_attention_heads * spec.head_dim
    kv = spec.num_key_value_heads * spec.head_dim
    layer = spec.hidden_size * (2 * query + 2 * kv + 3 * spec.intermediate_size)
    weights = spec.num_hidden_layers * layer + spec.vocab_size * spec.hidden_size
    return 2.0 * weights + spec.num_hidden_layers * 2.0 * length * query
