"""Settings of a role's Megatron backend: sections `*.megatron`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, check_names
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict, freeze
from mrl.config.section import Section

Dtype = Literal["bfloat16", "float32"]

TRANSFORMER_DEFAULTS: Mapping[str, Any] = freeze(
    {
        "recompute_granularity": None,
        "recompute_modules": ["core_attn"],
        "recompute_method": None,
        "recompute_num_layers": None,
    }
)
"""verl's defaults of `override_transformer_config`."""


@dataclass(kw_only=True, frozen=True)
class MegatronConfig(Section):
    """How a role's model is laid out over the ranks; all that a reference needs."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share each layer; null chooses a layout that fits and prints it."""
    pipeline_model_parallel_size: int | None = None
    """Pipeline stages; null chooses a layout that fits and prints it."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); null is off."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; acts on packed samples (`use_remove_padding`)."""
    expert_model_parallel_size: int = 1
    """Parts into which the ranks of a pipeline stage deal out each layer's experts; 1 for models without experts."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; null is 1, whole experts (for verl's Megatron: tensor_model_parallel_size)."""
    sequence_parallel: bool = True
    """Split activations between tensor-parallel regions along the sequence; acts with tensor parallelism."""
    use_remove_padding: bool = True
    """Run a micro-batch's samples end to end instead of padded to the longest; the model's unless set."""
    param_offload: bool = False
    """Keep parameters in host memory while the role is not used. Of an actor, whose parameters engines read in place,
    only the gradients go."""
    seed: int = 42
    """Seed of dropout and of weights that no checkpoint holds, such as the value head."""
    dtype: Dtype = "bfloat16"
    """Type of parameters and activations; the optimizer keeps float32."""
    use_dist_checkpointing: bool = False
    """Take the initial weights from `dist_checkpointing_path` instead of the model's folder."""
    dist_checkpointing_path: str | None = None
    """Folder that `mrl convert hf2megatron` wrote, or a checkpoint of a run, of any layout."""
    override_transformer_config: Mapping[str, Any] = field(default_factory=lambda: FrozenDict(TRANSFORMER_DEFAULTS))
    """Of Megatron's TransformerConfig `recompute_granularity`, `recompute_method`, `recompute_num_layers` and
    `recompute_modules`; the rest follows from the model and the device."""

    def check(self) -> None:
        at_least(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        )
        if self.context_parallel_size > 1 and not self.use_remove_padding:
            raise ConfigError(
                f"context_parallel_size = {self.context_parallel_size} shares packed sequences only; set "
                "use_remove_padding=True"
            )
        if self.use_dist_checkpointing and self.dist_checkpointing_path is None:
            raise ConfigError(
                "use_dist_checkpointing = True needs dist_checkpointing_path, the folder of a checkpoint; "
                "`mrl convert hf2megatron` writes one"
            )
        check_names(self, "override_transformer_config", TRANSFORMER_DEFAULTS)
        _check_recompute(self.override_transformer_config)


@dataclass(kw_only=True, frozen=True)
class TrainableMegatronConfig(MegatronConfig):
    """The same for a role that is trained."""

    grad_offload: bool = False
    """Release gradient buffers while the role is not used."""
    optimizer_offload: bool = False
    """Keep the optimizer's state in host memory while the role is not used."""
    use_distributed_optimizer: bool = True
    """Split the optimizer's state over data-parallel ranks."""
    override_ddp_config: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Of Megatron's DistributedDataParallelConfig `overlap_grad_reduce`, `overlap_param_gather` and `bucket_size`."""

    def check(self) -> None:
        super().check()
        check_names(self, "override_ddp_config", ("overlap_grad_reduce", "overlap_param_gather", "bucket_size"))


@dataclass(kw_only=True, frozen=True)
class RouterReplayConfig(Section):
    """Which experts an actor's tokens are sent to."""

    mode: Literal["disabled", "R3"] = "disabled"
    """R3 sends each token to the experts to which the rollout engine sent it; disabled leaves it to the router. Of a
    model with experts only."""


@dataclass(kw_only=True, frozen=True)
class ActorMegatronConfig(TrainableMegatronConfig):
    """The same for the actor."""

    router_replay: RouterReplayConfig = field(default_factory=RouterReplayConfig)
    """Which experts its tokens are sent to."""


def _check_recompute(overrides: Mapping[str, Any]) -> None:
    name = "override_transformer_config.recompute_"
    granularity, method = overrides.get("recompute_granularity"), overrides.get("recompute_method")
    num_layers = overrides.get("recompute_num_layers")
    if granularity not in (None, "full", "selective"):
        raise ConfigError(f"{name}granularity = {granularity!r} must be 'full', 'selective' or null")
    if method not in (None, "uniform", "block"):
        raise ConfigError(f"{name}method = {method!r} must be 'uniform', 'block' or null")
    if granularity == "full" and (method is None or num_layers is None):
        raise ConfigError(
            f"{name}granularity = 'full' needs {name}method (uniform or block) and {name}num_layers; "
            f"they are {method!r} and {num_layers!r}"
        )
    if granularity != "full" and (method is not None or num_layers is not None):
        raise ConfigError(
            f"{name}method = {method!r} and {name}num_layers = {num_layers!r} act only with "
            f"{name}granularity = 'full', which is {granularity!r}; set that, or leave them null"
        )
