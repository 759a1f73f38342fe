"""verl's keys that need no setting: dropped with a line where nothing is lost, refused where something would be."""

from __future__ import annotations

import logging

import pytest

from mrl.config.errors import ConfigError
from mrl.config.keys import find_leaf, flatten
from mrl.config.load import load_config
from mrl.config.superfluous import SUPERFLUOUS

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
TRANSFORMER = f"{ACTOR}.megatron.override_transformer_config"
OPTIMIZER = f"{ACTOR}.optim.override_optimizer_config"


def test_keys_as_verls_users_write_them_change_nothing(caplog):
    written = [
        "model_engine=megatron",
        f"{ACTOR}.megatron.use_mbridge=True",
        f"{ACTOR}.megatron.vanilla_mbridge=False",
        "actor_rollout_ref.ref.megatron.use_mbridge=True",
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.trust_remote_code=True",
        "data.trust_remote_code=True",
        "actor_rollout_ref.nccl_timeout=1200",
        f"{ROLLOUT}.enable_chunked_prefill=True",
        f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=4096",
        f"+{ROLLOUT}.engine_kwargs.vllm.disable_mm_preprocessor_cache=True",
        f"+{TRANSFORMER}.apply_rope_fusion=True",
        f"+{TRANSFORMER}.moe_token_dispatcher_type='alltoall'",
        f"+{TRANSFORMER}.moe_router_dtype=fp32",
        f"+{TRANSFORMER}.moe_aux_loss_coeff=0.0",
        f"+{OPTIMIZER}.optimizer_offload_fraction=1.0",
        "critic.model.lora.rank=0",
        "critic.model.lora.alpha=0",
    ]
    with caplog.at_level(logging.INFO, logger="mrl.config"):
        assert flatten(load_config(written)) == flatten(load_config())
    (line,) = [record.getMessage() for record in caplog.records if "need no setting here" in record.getMessage()]
    assert all(text.removeprefix("+") in line for text in written)


def test_adam_on_the_host_becomes_the_optimizers_offload():
    overrides = [f"+{OPTIMIZER}.optimizer_cpu_offload=True", f"+{OPTIMIZER}.overlap_cpu_optimizer_d2h_h2d=True"]
    assert load_config(overrides).actor_rollout_ref.actor.megatron.optimizer_offload
    assert not load_config(
        [f"+{OPTIMIZER}.optimizer_cpu_offload=False"]
    ).actor_rollout_ref.actor.megatron.optimizer_offload


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model_engine=fsdp", r"model_engine: set it to megatron"),
        (f"{ACTOR}.strategy=fsdp", r"strategy: drop it: Megatron is the only training backend"),
        (f"{ACTOR}.megatron.use_megatron_fsdp=True", r"use_megatron_fsdp: set it to False"),
        ("+actor_rollout_ref.model.lora={rank:32}", r"model\.lora: drop it: there are no LoRA adapters"),
        (f"{ROLLOUT}.val_kwargs.do_sample=maybe", r"do_sample = maybe must be True or False"),
        ("actor_rollout_ref.model.lora.rank=32", r"lora\.rank: drop it: there are no LoRA adapters"),
        (f"{ROLLOUT}.enable_chunked_prefill=False", r"chunked_prefill_size=-1"),
        (f"{ROLLOUT}.quantization=fp8", r"engines compute in the actor's type"),
    ],
)
def test_a_value_that_would_be_missed_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([override])


def test_no_key_is_dropped_that_exists():
    free_form = ("override_", "engine_kwargs.")
    assert [key for key in SUPERFLUOUS if find_leaf(key) and not any(part in key for part in free_form)] == []
