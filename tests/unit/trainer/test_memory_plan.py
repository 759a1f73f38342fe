"""Predicted memory against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_specs import make_spec

from mrl.config.load import load_config
from mrl.parallel.auto_layout import BytesPerParameter
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import MixtureOfExperts
from mrl.trainer.machine import Machine
from mrl.trainer.memory_plan import EngineMemory, RoleMemory, plan_device_memory, plan_host_memory
from mrl.trainer.plan import plan_run

GIB = 2**30
# Embedding and head 64 * 16 each; per layer qkv 3 * 16 * 16, o 16 * 16, MLP 3 * 16 * 32, two norms; one final norm.
SPEC = make_spec(
    family="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    head_dim=4,
    max_position_embeddings=128,
    attention_bias=False,
)
PER_LAYER = 4 * 256 + 3 * 512 + 32
TOTAL = 2 * 1024 + 4 * PER_LAYER + 16
BF16 = BytesPerParameter.of(weight=2, trained=True)


def items_of(plan):
    return {item.name: (item.training, item.rollout, item.host) for item in plan.items}


def test_a_device_holds_shards_and_gives_back_what_is_offloaded():
    layout = ParallelLayout(world_size=4, tp=2)
    actor = RoleMemory(name="actor", spec=SPEC, layout=layout, bytes_per_parameter=BF16, offloads_optimizer=True)
    engine = EngineMemory(spec=SPEC, tp=4, bytes_per_weight=2, static_fraction=0.5, releases=True)
    plan = plan_device_memory([actor], engine, gpu_bytes=100_000, host_bytes_per_rank=100_000)
    half = TOTAL // 2
    assert items_of(plan) == {
        "actor weights": (2 * half, 2 * half, 0),
        "actor gradients": (4 * half, 4 * half, 0),
        # Main copy and two moments, 12 bytes, over two data-parallel ranks.
        "actor optimizer": (6 * half, 0, 6 * half),
        "engine weights": (0, 2 * TOTAL // 4, 0),
        "KV cache": (0, 50_000 - 2 * TOTAL // 4, 0),
    }
    plan.check()


def test_weights_that_are_the_actors_memory_take_no_more():
    weights = 2 * TOTAL // 4
    engine = EngineMemory(spec=SPEC, tp=4, bytes_per_weight=2, static_fraction=0.5, aliased_bytes=weights - 100)
    items = items_of(plan_device_memory([], engine, gpu_bytes=100_000, host_bytes_per_rank=1))
    assert items == {"engine weights": (100, 100, 0), "KV cache": (50_000 - weights, 50_000 - weights, 0)}
    # Both copies are there before a small cache is.
    narrow = items_of(plan_device_memory([], engine, gpu_bytes=2 * weights + 60, host_bytes_per_rank=1))
    assert narrow == {"engine weights": (weights - 30, weights - 30, 0), "KV cache": (30, 30, 0)}
    on_host = replace(engine, static_fraction=None)
    assert items_of(plan_host_memory([], on_host, num_engines=3, host_bytes=GIB))["engine weights"][0] == 3 * 4 * 100


def test_an_exchange_between_hosts_needs_room_for_its_messages_beside_the_engine():
    engine = EngineMemory(spec=SPEC, tp=4, bytes_per_weight=2, static_fraction=0.5, crosses_hosts=True)
    plan = plan_device_memory([], engine, gpu_bytes=2**40, host_bytes_per_rank=0)
    # Two of 32 MiB in either direction.
    assert items_of(plan)["messages between hosts"] == (0, 128 * 2**20, 0)


def test_the_phase_that_does_not_fit_is_named_with_its_items():
    role = RoleMemory(name="critic", spec=SPEC, layout=ParallelLayout(world_size=1), bytes_per_parameter=BF16)
    engine = EngineMemory(spec=SPEC, tp=1, bytes_per_weight=2, static_fraction=0.5, releases=True)
    trained = 18 * TOTAL
    with pytest.raises(ValueError, match=r"training needs .* GiB \(critic weights .*, critic optimizer"):
        plan_device_memory([role], engine, gpu_bytes=trained - 1, host_bytes_per_rank=1).check()
    with pytest.raises(ValueError, match=r"the rollout needs .*KV cache.*gpu_memory_utilization"):
        plan_device_memory([role], engine, gpu_bytes=2 * trained - 2, host_bytes_per_rank=1).check()
    plan_device_memory([role], engine, gpu_bytes=2 * trained, host_bytes_per_rank=1).check()
    offloading = RoleMemory(
        name="critic",
        spec=SPEC,
        layout=ParallelLayout(world_size=1),
        bytes_per_parameter=BF16,
        offloads_weights=True,
        offloads_gradients=True,
        offloads_optimizer=True,
    )
    with pytest.raises(ValueError, match=r"host memory for what is offloaded needs .*critic optimizer"):
        plan_device_memory([offloading], engine, gpu_bytes=2 * trained, host_bytes_per_rank=14 * TOTAL - 1).check()


def test_roles_take_turns_with_what_they_offload():
    def role(name, spec, **offloads):
        layout = ParallelLayout(world_size=1)
        return RoleMemory(name=name, spec=spec, layout=layout, bytes_per_parameter=BF16, **offloads)

    both = {"offloads_gradients": True, "offloads_optimizer": True}
    larger = replace(SPEC, num_hidden_layers=5)
    more = TOTAL + PER_LAYER
    engine = EngineMemory(spec=SPEC, tp=1, bytes_per_weight=2, static_fraction=0.5, releases=True)
    roles = [role("actor", SPEC, **both), role("critic", larger, **both)]
    # Weights of both, and gradients, main copies and moments, 16 bytes, of the larger one.
    need = 2 * TOTAL + 18 * more
    plan_device_memory(roles, engine, gpu_bytes=need, host_bytes_per_rank=12 * (TOTAL + more)).check()
    with pytest.raises(ValueError, match=r"training needs .*critic optimizer") as refused:
        plan_device_memory(roles, engine, gpu_bytes=need - 1, host_bytes_per_rank=GIB).check()
    assert "actor optimizer" not in str(refused.value)
    with pytest.raises(ValueError, match="host memory"):
        plan_device_memory(roles, engine, gpu_bytes=need, host_bytes_per_rank=12 * (TOTAL + more) - 1).check()
    # Gradients that stay are there in the critic's turn, too.
    keeps = [role("actor", SPEC, offloads_optimizer=True), roles[1]]
    with pytest.raises(ValueError, match=r"training needs .*actor gradients"):
        plan_device_memory(keeps, engine, gpu_bytes=need + 4 * TOTAL - 1, host_bytes_per_rank=GIB).check()
    plan = plan_device_memory(keeps, engine, gpu_bytes=need + 4 * TOTAL, host_bytes_per_rank=GIB)
    plan.check()
    assert {"actor optimizer, in turn", "actor gradients", "critic gradients, in turn"} <= dict(plan.rows()).keys()


def test_an_engine_without_room_for_its_weights_is_refused():
    engine = EngineMemory(spec=SPEC, tp=1, bytes_per_weight=2, static_fraction=0.1)
    with pytest.raises(ValueError, match=r"gpu_memory_utilization = 0\.1"):
        plan_device_memory([], engine, gpu_bytes=20 * TOTAL, host_bytes_per_rank=1)


def test_a_host_without_gpus_holds_every_replica_and_engine():
    layout = ParallelLayout(world_size=4, pp=2)
    per = BytesPerParameter.of(weight=4, trained=True, distributed_optimizer=False)
    actor = RoleMemory(name="actor", spec=SPEC, layout=layout, bytes_per_parameter=per)
    engine = EngineMemory(spec=SPEC, tp=2, bytes_per_weight=4, static_fraction=None, kv_tokens=100)
    plan = plan_host_memory([actor], engine, num_engines=2, host_bytes=GIB)
    assert items_of(plan) == {
        "actor": (2 * 16 * TOTAL,) * 2 + (0,),
        "engine weights": (2 * 4 * TOTAL,) * 2 + (0,),
        "KV cache": (2 * 100 * 2 * 4 * 16 * 4,) * 2 + (0,),
    }


def test_experts_are_shared_out_over_their_own_axis():
    spec = replace(
        SPEC, family="mixtral", moe=MixtureOfExperts(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    )
    experts, routers = 4 * 4 * 3 * 512, 4 * 4 * 16
    dense = TOTAL - 4 * 3 * 512 + routers
    per = BytesPerParameter.of(weight=4, trained=True, distributed_optimizer=False)
    engine = EngineMemory(spec=SPEC, tp=1, bytes_per_weight=4, static_fraction=None)

    def actor_bytes(**axes):
        layout = ParallelLayout(world_size=4, tp=2, **axes)
        role = RoleMemory(name="actor", spec=spec, layout=layout, bytes_per_parameter=per)
        return items_of(plan_host_memory([role], engine, num_engines=1, host_bytes=GIB))["actor"][0]

    # Two replicas of everything: over tp x dp = 4 ranks the dense part is cut by tp = 2, the experts by ep or etp = 2.
    assert actor_bytes(ep=2) == actor_bytes(etp=2) == 2 * 16 * (dense + experts)
    assert actor_bytes(ep=2, etp=2) == 16 * (2 * dense + experts)


def test_a_run_is_planned_for_gpus_that_are_not_here(tmp_path):
    overrides = [f"trainer.default_local_dir={tmp_path}", "actor_rollout_ref.actor.megatron.optimizer_offload=True"]
    machine = Machine(device="cuda", host_bytes=64 * GIB, gpu_bytes=16 * GIB)
    plan = plan_run(load_config(["trainer.device=cuda", *overrides], "demo"), machine)
    rows = dict(plan.memory.rows())
    assert plan.device == "cuda"
    assert rows["KV cache"].split() == ["0.00", "training", "8.00", "rollout"]
    assert {"actor weights", "critic optimizer", "reference weights", "in host memory meanwhile"} <= set(rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_that_aliases_weights_counts_only_what_it_copies(tmp_path, device):
    machine = Machine(device=device, host_bytes=64 * GIB, gpu_bytes=16 * GIB)

    def engine_weights(alias):
        overrides = [f"actor_rollout_ref.rollout.alias_weights={alias}", f"trainer.device={device}"]
        config = load_config([f"trainer.default_local_dir={tmp_path}", *overrides], "demo")
        return items_of(plan_run(config, machine).memory)["engine weights"][1]

    alone, aliasing = engine_weights(False), engine_weights(True)
    # Embedding and head are padded otherwise, and a rank has two query groups.
    assert 0 < aliasing < 0.7 * alone


def test_what_cannot_fit_is_refused_before_anything_starts(tmp_path):
    machine = Machine(device="cpu", host_bytes=2**20)
    with pytest.raises(ValueError, match=r"training needs 0\.\d+ GiB \(actor 0\.\d+, critic"):
        plan_run(load_config([f"trainer.default_local_dir={tmp_path}"], "demo"), machine)
