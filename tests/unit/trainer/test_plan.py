"""What a configuration resolves to before anything starts."""

from __future__ import annotations

import json

import pytest
import torch
from family_configs import FAMILY_CONFIGS

from mrl.config.load import load_config
from mrl.trainer.machine import choose_device
from mrl.trainer.plan import plan_run
from mrl.trainer.schedules import updates_per_step
from mrl.types import MicroBatchLimit

ACTOR = "actor_rollout_ref.actor"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def plan(run_dir, *overrides):
    return plan_run(load_config([f"trainer.default_local_dir={run_dir}", *overrides], "demo"))


def test_the_demo_is_eight_ranks_in_three_layouts(run_dir):
    result = plan(run_dir)
    assert str(result.actor.layout) == "TP2 x PP2 x DP2"
    assert str(result.critic.layout) == "TP1 x PP2 x DP4"
    assert result.reference is not None
    assert result.reference.layout == result.actor.layout
    assert (result.rollout_tp, result.num_engines, result.device) == (2, 1, "cpu")
    assert result.actor.spec.family == "qwen2"
    assert result.critic.spec.family == "llama"


def test_without_a_kl_term_there_is_no_reference(run_dir):
    assert plan(run_dir, "algorithm.use_kl_in_reward=False").reference is None


def test_advantages_without_values_plan_no_critic(run_dir):
    result = plan(
        run_dir, "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "critic.model.path=/nowhere"
    )
    assert result.critic is result.critic_schedule is result.critic_record is None
    assert ("critic", "none: advantages need no values") in result.rows()


def test_sizes_are_of_samples_per_rank(run_dir):
    result = plan(run_dir, "actor_rollout_ref.rollout.n=2", f"{ACTOR}.ppo_micro_batch_size_per_gpu=8")
    schedule = result.actor_schedule
    assert schedule.mini_batch_size == 64
    assert schedule.update_limit == MicroBatchLimit(samples=8)
    assert updates_per_step(schedule, 256) == 8


def test_limits_by_tokens_follow_the_actors_as_in_verl(run_dir):
    result = plan(run_dir, f"{ACTOR}.use_dynamic_bsz=True", f"{ACTOR}.ppo_max_token_len_per_gpu=100")
    critic = result.critic_schedule
    assert critic is not None
    assert result.actor_schedule.update_limit == MicroBatchLimit(tokens=100)
    assert result.actor_schedule.forward_limit == result.ref_limit == MicroBatchLimit(tokens=100)
    assert critic.update_limit == critic.forward_limit == MicroBatchLimit(tokens=32768)


def test_each_pass_may_have_its_own_limit(run_dir):
    result = plan(
        run_dir,
        "critic.forward_micro_batch_size_per_gpu=32",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=200",
    )
    assert result.critic_schedule is not None
    assert result.critic_schedule.update_limit == MicroBatchLimit(samples=8)
    assert result.critic_schedule.forward_limit == MicroBatchLimit(samples=32)
    assert result.actor_schedule.update_limit == MicroBatchLimit(samples=16)
    assert result.actor_schedule.forward_limit == MicroBatchLimit(tokens=200)
    assert result.ref_limit == MicroBatchLimit(samples=64)


def test_layouts_left_open_are_chosen_and_as_many_engines_as_fit(run_dir):
    open_layout = [f"{ACTOR}.megatron.{axis}_model_parallel_size=null" for axis in ("tensor", "pipeline")]
    sizes = [f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", "actor_rollout_ref.rollout.num_engines=null"]
    result = plan(run_dir, *open_layout, *sizes)
    assert str(result.actor.layout) == "TP1 x PP1 x DP8"
    assert result.num_engines == 4


def test_ranks_that_share_sequences_are_left_out_of_a_chosen_layout(run_dir):
    open_layout = [f"{ACTOR}.megatron.{axis}_model_parallel_size=null" for axis in ("tensor", "pipeline")]
    shared = [f"{ACTOR}.megatron.context_parallel_size=4", f"{ACTOR}.megatron.use_remove_padding=True"]
    assert str(plan(run_dir, *open_layout, *shared).actor.layout) == "TP1 x PP1 x CP4 x DP2"


def test_experts_are_dealt_out_as_configured_in_chosen_layouts_too(run_dir, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILY_CONFIGS["qwen3_moe"]))
    sizes = [f"{ACTOR}.megatron.{key}" for key in ("expert_model_parallel_size=4", "sequence_parallel=True")]
    overrides = [f"actor_rollout_ref.model.path={tmp_path}", *sizes]
    result = plan(run_dir, *overrides)
    assert str(result.actor.layout) == "TP2 x PP2 x EP4 x DP2 + SP"
    assert result.reference is not None
    assert result.reference.layout == result.actor.layout
    open_layout = [f"{ACTOR}.megatron.{axis}_model_parallel_size=null" for axis in ("tensor", "pipeline")]
    assert plan(run_dir, *overrides, *open_layout, f"{ACTOR}.ppo_micro_batch_size_per_gpu=4").actor.layout.ep == 4
    in_parts = plan(
        run_dir, *overrides, *(f"{ACTOR}.megatron.expert_{key}_parallel_size=2" for key in ("model", "tensor"))
    )
    assert str(in_parts.actor.layout) == "TP2 x PP2 x EP2 x ETP2 x DP2 + SP"
    assert in_parts.reference.layout == in_parts.actor.layout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{ACTOR}.megatron.expert_model_parallel_size=2"], "actor.megatron: .* qwen2 models have no experts"),
        ([f"{ACTOR}.megatron.expert_tensor_parallel_size=2"], "actor.megatron: .* qwen2 models have no experts"),
        (
            [f"{ACTOR}.megatron.expert_{key}_parallel_size=4" for key in ("model", "tensor")],
            "actor.megatron: expert_tensor_parallel_size x .* = 16 does not divide the 4 ranks",
        ),
        (
            [f"{ACTOR}.megatron.router_replay.mode=R3"],
            "actor.megatron: router_replay.mode = R3 .* a qwen2 model has none; set it to disabled",
        ),
        ([f"{ACTOR}.megatron.tensor_model_parallel_size=16"], "does not divide world size 8"),
        (["critic.megatron.pipeline_model_parallel_size=4"], "critic.megatron: .*4"),
        (["actor_rollout_ref.rollout.num_engines=5"], "need 10 ranks"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=8"], "4 KV heads"),
        (
            ["trainer.nnodes=4", "trainer.n_gpus_per_node=6", "actor_rollout_ref.rollout.tensor_model_parallel_size=4"],
            "takes whole hosts or a part of one",
        ),
        (["data.max_prompt_length=1000"], "max_position_embeddings = 256"),
        ([f"{ACTOR}.ppo_micro_batch_size_per_gpu=null"], "ppo_micro_batch_size_per_gpu is null"),
        (["critic.ppo_micro_batch_size_per_gpu=3"], "does not divide a mini-batch of 32"),
        (["actor_rollout_ref.model.path=/nowhere"], "/nowhere does not exist"),
        (
            ["reward.reward_model.enable=True", "reward.reward_model.model_path=/nowhere"],
            r"reward\.reward_model\.model_path = /nowhere does not exist",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_numbers(run_dir, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan(run_dir, *overrides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_not_assumed():
    with pytest.raises(ValueError, match=r"no CUDA device; set trainer\.device=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"


def test_weights_on_hosts_without_engines_are_refused_where_no_other_host_holds_them(run_dir):
    # Eight ranks of TP2 x PP2 x DP2 on two hosts: one stage on each.
    hosts = ["trainer.nnodes=2", "trainer.n_gpus_per_node=4"]
    with pytest.raises(ValueError, match=r"num_engines = 1 at TP2 leaves hosts \[1\] .* raise num_engines"):
        plan(run_dir, *hosts)
    assert plan(run_dir, *hosts, "actor_rollout_ref.rollout.num_engines=3").num_engines == 3
    # Without a pipeline the second host's ranks are replicas of the first's.
    whole = [f"{ACTOR}.megatron.pipeline_model_parallel_size=1", f"{ACTOR}.ppo_micro_batch_size_per_gpu=8"]
    assert plan(run_dir, *hosts, *whole).num_engines == 1
