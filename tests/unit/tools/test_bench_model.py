"""The model that benchmarks train: its weights and its arithmetic."""

from __future__ import annotations

from dataclasses import replace

import torch
from bench_model import TINY, flops_per_token, write_model
from safetensors.torch import load_file

from mrl.reshard.families import tensor_shapes


def test_a_written_model_has_every_tensor_and_no_two_equal_rows(tmp_path):
    spec = write_model(tmp_path / "model", TINY, max_length=64)
    weights = load_file(tmp_path / "model/model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == tensor_shapes(spec)
    embedding = weights["model.embed_tokens.weight"]
    assert len(torch.unique(embedding, dim=0)) == TINY.vocab_size


def test_flops_are_two_per_weight_and_half_of_attention(tmp_path):
    shape = replace(TINY, hidden_size=8, intermediate_size=16, num_hidden_layers=3, vocab_size=32)
    spec = write_model(tmp_path / "model", shape, max_length=64)
    # q and o 8 x 8, k and v 4 x 8, three 16 x 8; queries of width 8 meet 10 keys in two products, half masked.
    layer = 2 * 64 + 2 * 32 + 3 * 128
    assert flops_per_token(spec, 10) == 2 * (3 * layer + 32 * 8) + 3 * (2 * 2 * 10 * 8) / 2
