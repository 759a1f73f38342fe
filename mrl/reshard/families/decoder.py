"""The layout of a decoder in Hugging Face, Megatron and SGLang: what is around the layers, and its family's layers.

Vocabulary rows are padded by the owner of the parameter and cut uniformly; rows past the vocabulary belong to no
Hugging Face tensor.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import Literal

from mrl.reshard.families.family import families
from mrl.reshard.families.tables import Cut, LocalParam, Rule, Segment, replicated, stack
from mrl.reshard.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
VOCABULARY_PARAMS = frozenset({"embedding.word_embeddings.weight", "output_layer.weight", EMBEDDING, LM_HEAD})
_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")
_SGLANG_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical Hugging Face tensor names and shapes; a tied `lm_head.weight` is not listed."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    parts = families()[spec.family].layer(spec)
    for layer in range(spec.num_hidden_layers):
        for part in parts:
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in part.tensors.items()}
    shapes[FINAL_NORM] = (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_params(spec: ModelSpec, side: Literal["megatron", "sglang"]) -> Collection[str]:
    """Names of the parameters that a layer may have on a side, without the layer's prefix."""
    return (_megatron_rules if side == "megatron" else _sglang_rules)(spec).keys()


def expert_params(spec: ModelSpec) -> int:
    """Parameters of all experts of one layer, without their router; 0 of a dense model."""
    return 3 * spec.hidden_size * spec.intermediate_size * spec.moe.num_experts if spec.moe else 0


def count_params(spec: ModelSpec) -> int:
    """All parameters, embeddings included; a tied head is counted once."""
    matrices = 1 if spec.tie_word_embeddings else 2
    layer = sum(math.prod(shape) for part in families()[spec.family].layer(spec) for shape in part.tensors.values())
    return spec.num_hidden_layers * layer + spec.hidden_size * (1 + matrices * spec.vocab_size)


def megatron_param(spec: ModelSpec, name: str, cut: Cut, *, vocab_rows: int) -> LocalParam:
    """A parameter of Megatron's GPTModel; `vocab_rows` is the padded vocabulary's share of one rank."""
    if name == "embedding.word_embeddings.weight":
        return _vocabulary(spec, EMBEDDING, cut, vocab_rows)
    if name == "output_layer.weight":
        return _vocabulary(spec, EMBEDDING if spec.tie_word_embeddings else LM_HEAD, cut, vocab_rows)
    if name == "decoder.final_layernorm.weight":
        return replicated(FINAL_NORM, spec.hidden_size)(cut, "")
    return _layer_param(spec, name, cut, _MEGATRON_LAYER, _megatron_rules(spec))


def sglang_param(spec: ModelSpec, name: str, cut: Cut, *, vocab_rows: int) -> LocalParam:
    """A parameter of SGLang's causal language model, without pipeline parallelism."""
    if name == EMBEDDING:
        return _vocabulary(spec, EMBEDDING, cut, vocab_rows)
    if name == LM_HEAD:
        return _vocabulary(spec, EMBEDDING if spec.tie_word_embeddings else LM_HEAD, cut, vocab_rows)
    if name == FINAL_NORM:
        return replicated(FINAL_NORM, spec.hidden_size)(cut, "")
    return _layer_param(spec, name, cut, _SGLANG_LAYER, _sglang_rules(spec))


# A plan asks for thousands of parameters of one spec.
@functools.lru_cache(maxsize=8)
def _megatron_rules(spec: ModelSpec) -> Mapping[str, Rule]:
    return {name: rule for part in families()[spec.family].layer(spec) for name, rule in part.megatron.items()}


@functools.lru_cache(maxsize=8)
def _sglang_rules(spec: ModelSpec) -> Mapping[str, Rule]:
    return {name: rule for part in families()[spec.family].layer(spec) for name, rule in part.sglang.items()}


def _layer_param(
    spec: ModelSpec, name: str, cut: Cut, pattern: re.Pattern[str], rules: Mapping[str, Rule]
) -> LocalParam:
    match = pattern.match(name)
    rule = rules.get(match[2]) if match else None
    if match is None or rule is None:
        raise ValueError(f"{cut.side} parameter {name} has no place in a {spec.family} checkpoint")
    layer = int(match[1])
    if layer >= spec.num_hidden_layers:
        raise ValueError(
            f"{cut.side} parameter {name} names layer {layer}, but the model has {spec.num_hidden_layers} layers; "
            "layer numbers must be global"
        )
    return rule(cut, f"model.layers.{layer}.")


def _vocabulary(spec: ModelSpec, tensor: str, cut: Cut, rows: int) -> LocalParam:
    if rows * cut.size < spec.vocab_size:
        raise ValueError(
            f"{cut.side} holds {rows} vocabulary rows on each of {cut.size} ranks, fewer than the {spec.vocab_size} "
            f"of {tensor}"
        )
    start = rows * cut.rank
    pieces = stack([Segment(tensor, 0, spec.vocab_size)], spec.hidden_size, start, start + rows)
    return LocalParam((rows, spec.hidden_size), pieces)
