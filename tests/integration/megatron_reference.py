"""Tiny Hugging Face models, batches, a PPO-like loss, and single-process training of them without Megatron."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from family_configs import FAMILY_CONFIGS
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.optimizer import OptimizerSettings
from mrl.interfaces import LossFn, ModelOutput
from mrl.reshard.families import tensor_shapes
from mrl.reshard.layout import SourceParam, SourceRank
from mrl.reshard.sources import source_pieces
from mrl.reshard.spec import ModelSpec
from mrl.reshard.transport import open_buffer
from mrl.types import Metric, TrainBatch

TEMPERATURE = 0.7
MakeLoss = Callable[[TrainBatch], LossFn]
# Adam divides by the root of the second moment: a larger eps keeps rounding in tiny gradients from being blown up.
OPTIMIZER = OptimizerSettings(
    lr=5e-3, eps=1e-3, weight_decay=0.1, clip_grad=0.5, lr_warmup_steps=2, lr_warmup_init=1e-3
)
LEARNING_RATES = (1e-3, 3e-3)

HIDDEN, FFN, LAYERS = 128, 192, 4


def save_tiny_model(
    path: Path,
    family: str,
    *,
    vocab_size: int,
    kv_heads: int,
    tied: bool = False,
    sharded: bool = False,
    hidden_size: int = HIDDEN,
    layers: int = LAYERS,
) -> str:
    """A random model of a family, saved by `save_random_model`; four layers serve every layout but pp4 vpp2."""
    config = {
        **FAMILY_CONFIGS[family],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    return save_random_model(path, config, sharded=sharded)


def save_random_model(path: Path, config: dict[str, Any], *, sharded: bool = False) -> str:
    """A random model with non-trivial biases and norms, saved as a Hugging Face folder."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config, initializer_range=0.08), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(path, max_shard_size="500KB" if sharded else "1GB")
    return str(path)


def make_batch(vocab_size: int, num_samples: int, *, seed: int) -> TrainBatch:
    """Samples of different lengths with random old log-probs, advantages and returns."""
    generator = torch.Generator().manual_seed(seed)
    width = 24
    lengths = torch.randint(6, width + 1, (num_samples,), generator=generator)
    position = torch.arange(width)
    shape = (num_samples, width)
    inside = position < lengths[:, None]
    return TrainBatch(
        tokens=torch.randint(0, vocab_size, shape, generator=generator) * inside,
        lengths=lengths,
        loss_mask=inside & (position >= 3),
        old_log_probs=(-5.5 + 0.1 * torch.randn(shape, generator=generator)) * inside,
        advantages=torch.randn(shape, generator=generator) * inside,
        returns=torch.randn(shape, generator=generator) * inside,
    )


def policy_loss(mini_batch: TrainBatch) -> LossFn:
    """Clipped surrogate minus an entropy bonus, averaged over the mini-batch's trained tokens."""
    denominator = mini_batch.loss_mask.sum()

    def loss_fn(output: ModelOutput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        mask = batch.loss_mask
        assert batch.old_log_probs is not None
        assert batch.advantages is not None
        ratio = (output["log_probs"] - batch.old_log_probs).exp()
        surrogate = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
        entropy = (output["entropy"] * mask).sum() / denominator
        loss = -(surrogate * mask).sum() / denominator - 0.05 * entropy
        largest = ratio.detach().masked_fill(~mask, 0.0).max()
        return loss, {"entropy": Metric(entropy.detach()), "ratio_max": Metric(largest, "max")}

    return loss_fn


def value_loss(mini_batch: TrainBatch) -> LossFn:
    """Squared error, averaged over the mini-batch's trained tokens."""
    denominator = mini_batch.loss_mask.sum()

    def loss_fn(output: ModelOutput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        assert batch.returns is not None
        return ((output["values"] - batch.returns) ** 2 * batch.loss_mask).sum() / denominator, {}

    return loss_fn


@dataclass
class Reference:
    """The same model in transformers, one process, torch.optim.AdamW."""

    model: torch.nn.Module
    head: torch.nn.Linear | None = None

    def outputs(self, batch: TrainBatch) -> dict[str, Tensor]:
        """`log_probs` and `entropy`, or `values` with a head; aligned as in mrl.types."""
        inside = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        if self.head is not None:
            values = self.head(self.model.model(batch.tokens).last_hidden_state).squeeze(-1)
            return {"values": _shift(values, inside)}
        log_softmax = (self.model(batch.tokens).logits / TEMPERATURE).log_softmax(-1)
        log_probs = log_softmax.gather(-1, batch.tokens.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return {"log_probs": _shift(log_probs, inside), "entropy": _shift(entropy, inside)}

    def train(
        self, mini_batches: list[TrainBatch], make_loss: Callable[[TrainBatch], LossFn]
    ) -> list[dict[str, float]]:
        """One AdamW step per mini-batch; biases and norms without decay."""
        named = [(n, p) for n, p in self.model.named_parameters() if self.head is None or not n.startswith("lm_head")]
        named += [] if self.head is None else [(f"head.{n}", p) for n, p in self.head.named_parameters()]
        groups = [
            {"params": [p for _, p in named if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, eps=OPTIMIZER.eps)
        log = []
        for mini_batch, lr in zip(mini_batches, LEARNING_RATES, strict=True):
            adam.zero_grad()
            loss, metrics = make_loss(mini_batch)(self.outputs(mini_batch), mini_batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], OPTIMIZER.clip_grad)
            for group in adam.param_groups:
                group["lr"] = lr
            adam.step()
            numbers = {name: float(metric.value) for name, metric in metrics.items()}
            log.append({"loss": float(loss), "grad_norm": float(norm), "lr": lr, **numbers})
        return log


def load_reference(path: str) -> Reference:
    """The folder's model in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return Reference(model.eval())


def _shift(predicted: Tensor, inside: Tensor) -> Tensor:
    return torch.nn.functional.pad(predicted[:, :-1], (1, 0)).masked_fill(~inside, 0.0)


def gather_hf_tensors(engine: MegatronEngine, spec: ModelSpec) -> dict[str, Tensor]:
    """The role's weights under their Hugging Face names, read by rank 0 from all ranks' exported memory.

    Called by all ranks; empty but on rank 0.
    """
    sources: list[SourceRank] = [engine.export_weights() for _ in range(dist.get_world_size())]
    dist.all_gather_object(sources, engine.export_weights())
    tensors: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        tensors = {name: torch.full(shape, torch.nan) for name, shape in tensor_shapes(spec).items()}
        for source, param in itertools.chain.from_iterable(((s, p) for p in s.params) for s in sources):
            _copy_pieces(tensors, spec, source, param)
    dist.barrier()
    return tensors


def _copy_pieces(tensors: dict[str, Tensor], spec: ModelSpec, source: SourceRank, param: SourceParam) -> None:
    numel = torch.Size(param.shape).numel()
    raw = open_buffer(source.buffers[param.buffer])[param.offset_bytes :]
    local = raw[: numel * 4].view(torch.float32).view(param.shape[0], -1)
    for piece in source_pieces(spec, source, param):
        target = tensors[piece.tensor].view(tensors[piece.tensor].shape[0], -1)
        box = local[piece.local_row : piece.local_row + piece.rows, piece.local_col : piece.local_col + piece.cols]
        target[piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols] = box
