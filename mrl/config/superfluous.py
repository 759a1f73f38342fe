"""verl's keys for which there is nothing to set here: dropped with a logged line, where that changes no result.

A value that would change one is not dropped; the key is then unknown, and `compat.ADVICE` says what to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from mrl.config.assignment import Assignment, find_nearest

_MODELS = ("actor_rollout_ref.model", "critic.model")
_MEGATRON = ("actor_rollout_ref.actor.megatron", "actor_rollout_ref.ref.megatron", "critic.megatron")
_TRAINED = ("actor_rollout_ref.actor", "critic")
_ROLLOUT = "actor_rollout_ref.rollout"

_FUSED = "log-probs and entropy come from fused kernels wherever there are any"
_CODE = "no code of a model's folder is run"
_BACKEND = "Megatron is the only training backend"
_IN_PLACE = "engines pull the weights in place"
_ONE_ENGINE = "SGLang generates"
_NO_LORA = "all parameters are trained"
_CHOSEN = "what is fastest on the device without changing results is chosen by itself"
_ROUTER = "routers compute in the model's type, as the engines' do"
_NO_LOSS = "no auxiliary loss is added to PPO's"
_EXPORT = "exports are always complete and need no bridge"
_ON_HOST = "optimizer_offload moves all of the optimizer's state, which is float32, beside other work"

_LORA_DETAILS = (
    "exclude_modules",
    "lora.alpha",
    "lora.dropout",
    "lora.exclude_modules",
    "lora.lora_A_init_method",
    "lora.lora_B_init_method",
    "lora.merge",
    "lora.target_modules",
    "lora_alpha",
    "target_modules",
)
_FAST = (
    "apply_rope_fusion",
    "attention_backend",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_fusion_impl",
    "cross_entropy_loss_fusion",
    "deallocate_pipeline_outputs",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_enable_deepep",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_shared_expert_overlap",
    "moe_token_dispatcher_type",
    "persist_layer_norm",
    "use_flash_attn",
)


@dataclass(frozen=True)
class Superfluous:
    """What is said of a key or of a whole section."""

    reason: str
    values: Collection[str] | None = None
    """That may be dropped, in lower case; None is any."""


_FALSE, _TRUE, _MEGATRON_ALONE, _ZERO = {"false"}, {"true"}, {"megatron"}, {"0", "0.0", "null"}

SUPERFLUOUS: dict[str, Superfluous] = {
    "model_engine": Superfluous(_BACKEND, _MEGATRON_ALONE),
    **{f"{role}.strategy": Superfluous(_BACKEND, _MEGATRON_ALONE) for role in (*_TRAINED, "actor_rollout_ref.ref")},
    **{f"{role}.model_engine": Superfluous(_BACKEND, _MEGATRON_ALONE) for role in _TRAINED},
    **{f"{section}.use_mbridge": Superfluous(_EXPORT) for section in _MEGATRON},
    **{f"{section}.vanilla_mbridge": Superfluous(_EXPORT) for section in _MEGATRON},
    **{f"{section}.use_megatron_fsdp": Superfluous("it is off", _FALSE) for section in _MEGATRON},
    **{
        f"{section}.override_transformer_config.{name}": Superfluous(_CHOSEN) for section in _MEGATRON for name in _FAST
    },
    **{f"{section}.override_transformer_config.moe_router_dtype": Superfluous(_ROUTER) for section in _MEGATRON},
    **{
        f"{section}.override_transformer_config.{name}": Superfluous(_NO_LOSS, {*_ZERO, "none"})
        for section in _MEGATRON
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type")
    },
    **{
        f"{section}.override_transformer_config.account_for_{name}_in_pipeline_split": Superfluous("it is off", _FALSE)
        for section in _MEGATRON
        for name in ("embedding", "loss")
    },
    **{
        f"{section}.override_ddp_config.grad_reduce_in_fp32": Superfluous("gradients are summed in float32", _TRUE)
        for section in _MEGATRON
    },
    **{
        f"{role}.optim.override_optimizer_config.{name}": Superfluous(_ON_HOST, values)
        for role in _TRAINED
        for name, values in {
            "optimizer_cpu_offload": _FALSE,
            "optimizer_offload_fraction": None,
            "overlap_cpu_optimizer_d2h_h2d": None,
            "use_precision_aware_optimizer": None,
        }.items()
    },
    **{f"{role}.use_torch_compile": Superfluous(_FUSED) for role in (*_TRAINED, "actor_rollout_ref.ref")},
    **{f"{role}.checkpoint.strict": Superfluous(_EXPORT) for role in _TRAINED},
    **{f"{role}.checkpoint.mbridge_config": Superfluous(_EXPORT) for role in _TRAINED},
    **{f"{role}.checkpoint.save_lora_only": Superfluous(_NO_LORA, _FALSE) for role in _TRAINED},
    **{f"{model}.use_fused_kernels": Superfluous(_FUSED) for model in _MODELS},
    **{f"{model}.fused_kernel_options": Superfluous(_FUSED) for model in _MODELS},
    **{f"{model}.trust_remote_code": Superfluous(_CODE) for model in (*_MODELS, "data", "reward_model.model")},
    **{f"{model}.{name}": Superfluous(_NO_LORA, _ZERO) for model in _MODELS for name in ("lora.rank", "lora_rank")},
    **{f"{model}.lora": Superfluous(_NO_LORA, {"null", "{}"}) for model in _MODELS},
    **{f"{model}.{name}": Superfluous(_NO_LORA) for model in _MODELS for name in _LORA_DETAILS},
    **{f"{model}.mtp.enable": Superfluous("it is off", _FALSE) for model in _MODELS},
    f"{_ROLLOUT}.do_sample": Superfluous("the temperature decides", _TRUE),
    f"{_ROLLOUT}.enable_chunked_prefill": Superfluous("it is on, in pieces of max_num_batched_tokens", _TRUE),
    f"{_ROLLOUT}.enable_prefix_caching": Superfluous("it is on", _TRUE),
    f"{_ROLLOUT}.skip_tokenizer_init": Superfluous("engines take and give tokens", _TRUE),
    f"{_ROLLOUT}.disable_log_stats": Superfluous("engines' warnings are shown, and nothing else"),
    f"{_ROLLOUT}.expert_parallel_size": Superfluous("experts are shared out as layers are", {"null"}),
    f"{_ROLLOUT}.data_parallel_size": Superfluous("engines share out the prompts, as many as there is room for"),
    f"{_ROLLOUT}.moe_tensor_parallel_size": Superfluous("it follows from expert_parallel_size"),
    f"{_ROLLOUT}.quantization": Superfluous("engines compute in the actor's type", {"null", "none"}),
    f"{_ROLLOUT}.checkpoint_engine": Superfluous(_IN_PLACE),
    f"{_ROLLOUT}.update_weights_bucket_megabytes": Superfluous(_IN_PLACE),
    f"{_ROLLOUT}.engine_kwargs.vllm": Superfluous(_ONE_ENGINE),
    f"{_ROLLOUT}.engine_kwargs.trtllm": Superfluous(_ONE_ENGINE),
    **{
        f"{section}.nccl_timeout": Superfluous("trainer.phase_timeout_s is the longest wait")
        for section in ("actor_rollout_ref", "critic")
    },
    "data.filter_overlong_prompts_workers": Superfluous("rows are filtered as they are read"),
    "data.dataloader_num_workers": Superfluous("rows are read before the first step"),
    "reward_model.use_reward_loop": Superfluous("there is one implementation"),
    "trainer.use_legacy_worker_impl": Superfluous("there is one implementation"),
}
"""By key or section; the nearest one decides."""


def drop_superfluous(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """The assignments that act, and a line to log about the others."""
    kept: list[Assignment] = []
    dropped: dict[str, list[str]] = defaultdict(list)
    for item in assignments:
        found = find_nearest(SUPERFLUOUS, item.key)
        if found is not None and (found.values is None or item.plain in found.values):
            dropped[found.reason].append(f"{item.key}={item.value}")
        else:
            kept.append(item)
    listed = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in dropped.items())
    return kept, [f"keys of verl's that need no setting here: {listed}"] if listed else []
