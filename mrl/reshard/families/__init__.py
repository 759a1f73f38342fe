"""Model families: from config.json to a `ModelSpec`, and where each local parameter lies in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from mrl.reshard.families import decoder
from mrl.reshard.families.config import Config
from mrl.reshard.families.decoder import VOCABULARY_PARAMS, count_params, expert_params, layer_params, tensor_shapes
from mrl.reshard.families.family import families
from mrl.reshard.families.tables import Cut, LocalParam
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec

__all__ = [
    "VOCABULARY_PARAMS",
    "count_params",
    "expected_megatron_shape",
    "expected_sglang_shape",
    "expert_params",
    "families",
    "layer_params",
    "megatron_pieces",
    "padded_vocab_size",
    "sglang_pieces",
    "spec_from_config",
    "tensor_shapes",
]

_REMEDY = {
    "SGLang": ". SGLang on CPU pads instead of replicating: KV heads to a multiple of its tensor parallel size and "
    "intermediate_size to a multiple of 32 times it; choose a size that divides both"
}


def spec_from_config(config: Config) -> ModelSpec:
    """The spec of a parsed config.json.

    Raises:
        ValueError: an unsupported `model_type` or architecture, a missing size, or a field that cannot be honoured.
    """
    model_type = config.get("model_type")
    family = families().get(str(model_type))
    if family is None:
        raise ValueError(f"model_type = {model_type!r} is not supported; supported: {', '.join(sorted(families()))}")
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise ValueError(
            f"architectures = {architectures} of a {model_type} model is not supported; use {family.architecture}"
        )
    return family.read(config)


def megatron_pieces(
    spec: ModelSpec,
    name: str,
    shape: Sequence[int],
    *,
    tp_rank: int,
    tp_size: int,
    etp_rank: int = 0,
    etp_size: int = 1,
) -> list[Piece]:
    """Where one rank's Megatron parameter lies in the checkpoint.

    Args:
        name: in GPTModel (local or transformer-engine spec), with the layer's and the expert's global number.
        shape: of the live parameter; vocabulary rows may be padded, and padded rows are in no piece.
        etp_rank, etp_size: the rank's place among those that share an expert.

    Raises:
        ValueError: unknown name, a layout that does not divide, or another shape than the layout gives.
    """
    cut = Cut("Megatron", tp_rank, tp_size, etp_rank=etp_rank, etp_size=etp_size)
    return _checked(decoder.megatron_param(spec, name, cut, vocab_rows=shape[0]), name, shape, cut)


def sglang_pieces(
    spec: ModelSpec, name: str, shape: Sequence[int], *, tp_rank: int, tp_size: int, ep_size: int = 1
) -> list[Piece]:
    """Where one engine rank's parameter lies in the checkpoint; as `megatron_pieces`, under SGLang's CUDA rules.

    With expert parallelism, `tp_size` / `ep_size` consecutive ranks share an expert.
    """
    cut = Cut("SGLang", tp_rank, tp_size, ep_size)
    return _checked(decoder.sglang_param(spec, name, cut, vocab_rows=shape[0]), name, shape, cut)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the vocabulary that an actor's tp_group shares evenly: rounded up to a multiple of its size."""
    return _rounded_up(vocab_size, tp_size)


def expected_megatron_shape(
    spec: ModelSpec, name: str, *, tp_size: int, etp_size: int = 1, padded_vocab_size: int | None = None
) -> tuple[int, ...]:
    """Shape of one rank's Megatron parameter; the vocabulary is `padded_vocab_size`, by default unpadded."""
    cut = Cut("Megatron", 0, tp_size, etp_size=etp_size)
    rows = cut.share(padded_vocab_size or spec.vocab_size, "padded vocabulary") if _is_vocabulary(name) else 0
    return decoder.megatron_param(spec, name, cut, vocab_rows=rows).shape


def expected_sglang_shape(spec: ModelSpec, name: str, *, tp_size: int, ep_size: int = 1) -> tuple[int, ...]:
    """Shape of one engine rank's parameter.

    SGLang pads the vocabulary to a multiple of 64, on CPU to 64 times the size where that does not divide it.
    """
    cut = Cut("SGLang", 0, tp_size, ep_size)
    padded = _rounded_up(spec.vocab_size, 64)
    if padded % tp_size:
        padded = _rounded_up(spec.vocab_size, 64 * tp_size)
    rows = cut.share(padded, "padded vocabulary") if _is_vocabulary(name) else 0
    return decoder.sglang_param(spec, name, cut, vocab_rows=rows).shape


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _is_vocabulary(name: str) -> bool:
    return name in VOCABULARY_PARAMS


def _checked(param: LocalParam, name: str, shape: Sequence[int], cut: Cut) -> list[Piece]:
    if tuple(shape) == param.shape:
        return param.pieces
    message = (
        f"{cut.side} parameter {name} has shape {tuple(shape)}, but its layout at tensor parallel size {cut.size} is "
    )
    raise ValueError(f"{message}{param.shape}{_REMEDY.get(cut.side, '; check the sizes in config.json')}")
