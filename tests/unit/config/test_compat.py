"""verl's older spellings: what each becomes, what is logged, what is refused."""

import logging

import pytest

from mrl.config.assignment import Assignment
from mrl.config.batch import check_mini_batch, resolve_micro_batch_size
from mrl.config.compat import ALIASES, translate
from mrl.config.errors import ConfigError
from mrl.config.keys import find_leaf, flatten, leaf_keys
from mrl.config.load import load_config

RECOMPUTE = "megatron.override_transformer_config.recompute"


def pairs(*texts):
    return [Assignment(key=key, value=value) for key, _, value in (text.partition("=") for text in texts)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("actor_rollout_ref.actor.fsdp_config.param_offload", "actor_rollout_ref.actor.megatron.param_offload"),
        ("actor_rollout_ref.actor.fsdp_config.optimizer_offload", "actor_rollout_ref.actor.megatron.optimizer_offload"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload", "actor_rollout_ref.ref.megatron.param_offload"),
        ("critic.model.fsdp_config.param_offload", "critic.megatron.param_offload"),
        ("critic.model.fsdp_config.optimizer_offload", "critic.megatron.optimizer_offload"),
    ],
)
def test_an_fsdp_offload_key_becomes_megatrons(old, new, caplog):
    with caplog.at_level(logging.INFO, logger="mrl.config"):
        config = load_config([f"{old}=True"])
    assert flatten(config)[new] is True
    (line,) = [record.getMessage() for record in caplog.records if old in record.getMessage()]
    assert line.endswith(f"mapped: {old} -> {new}")


def test_all_mapped_keys_share_one_logged_line():
    _, notes = translate(pairs(*(f"{old}=True" for old in ALIASES)))
    assert len(notes) == 1
    assert all(f"{old} -> {new}" in notes[0] for old, new in ALIASES.items())


def test_every_alias_leads_to_a_key_that_exists():
    assert all(find_leaf(target) for target in ALIASES.values())
    assert not set(ALIASES) & set(leaf_keys())


def test_engines_experts_are_dealt_out_by_verls_key():
    config = load_config(["actor_rollout_ref.rollout.expert_parallel_size=2"])
    assert config.actor_rollout_ref.rollout.engine_kwargs.sglang == {"ep_size": 2}


@pytest.mark.parametrize("name", ["lr_warmup_steps", "lr_decay_steps", "total_training_steps"])
def test_a_length_of_the_schedule_that_follows_from_others_may_be_null(name):
    optim = load_config([f"critic.optim.{name}=null"]).critic.optim
    assert (optim.lr_warmup_steps, optim.total_training_steps) == (-1, -1)


def test_the_decay_may_end_under_megatrons_name():
    assert load_config(["critic.optim.lr_decay_steps=7"]).critic.optim.total_training_steps == 7


VALIDATION = "actor_rollout_ref.rollout.val_kwargs"


@pytest.mark.parametrize(
    ("overrides", "temperature"),
    [
        (["do_sample=False"], 0.0),
        (["do_sample=False", "temperature=0"], 0.0),
        (["do_sample=True", "temperature=0.6"], 0.6),
        (["do_sample='True'", "temperature=0.6"], 0.6),
    ],
)
def test_do_sample_agrees_with_the_temperature_of_validation(overrides, temperature):
    config = load_config([f"{VALIDATION}.{text}" for text in overrides])
    assert config.actor_rollout_ref.rollout.val_kwargs.temperature == temperature


@pytest.mark.parametrize(("do_sample", "temperature"), [("True", 0), ("True", "0.00"), ("False", 0.6)])
def test_do_sample_that_contradicts_the_temperature_is_refused(do_sample, temperature):
    with pytest.raises(ConfigError, match=rf"do_sample={do_sample} contradicts .*temperature={temperature}; keep only"):
        load_config([f"{VALIDATION}.do_sample={do_sample}", f"{VALIDATION}.temperature={temperature}"])


def test_nothing_is_traced_where_verls_roles_are_not_profiled(caplog):
    off = ["global_profiler.steps=[1]", "actor_rollout_ref.actor.profiler.enable=False", "critic.profiler.enable=False"]
    with caplog.at_level(logging.INFO, logger="mrl.config"):
        assert load_config(off).trainer.profile_steps is None
    assert "no role is profiled, so nothing is: global_profiler.steps=[1], " in caplog.text
    with pytest.raises(ConfigError, match=r"profiler\.enable: set trainer\.profile_steps"):
        load_config([*off[:2], "critic.profiler.enable=True"])


def test_router_replay_is_found_where_older_commands_put_it():
    assert load_config(["actor_rollout_ref.actor.router_replay.mode=R3"]).replays_routers


def test_both_spellings_may_agree_but_not_differ():
    old, new = "critic.model.fsdp_config.param_offload", "critic.megatron.param_offload"
    assert load_config([f"{old}=True", f"{new}=true"]).critic.megatron.param_offload
    with pytest.raises(ConfigError, match=r"are the same setting; keep only critic\.megatron\.param_offload"):
        load_config([f"{old}=True", f"{new}=False"])


def test_the_reward_function_is_found_where_older_commands_put_it():
    config = load_config(
        [
            "custom_reward_function.path=/r.py",
            "custom_reward_function.name=score",
            "+custom_reward_function.reward_kwargs.scale=2",
            "reward_model.num_workers=3",
        ]
    )
    reward = config.reward.custom_reward_function
    assert (reward.path, reward.name, reward.reward_kwargs) == ("/r.py", "score", {"scale": 2})
    assert config.reward.num_workers == 3


@pytest.mark.parametrize(
    ("model", "role"), [("actor_rollout_ref.model", "actor_rollout_ref.actor"), ("critic.model", "critic")]
)
def test_gradient_checkpointing_becomes_full_uniform_recompute_of_that_role_only(model, role):
    settings = {
        name: flatten(load_config([f"{model}.enable_gradient_checkpointing=True"]))[
            f"{name}.megatron.override_transformer_config"
        ]
        for name in ("actor_rollout_ref.actor", "critic")
    }
    on = settings.pop(role)
    (off,) = settings.values()
    values = [on[f"recompute_{name}"] for name in ("granularity", "method", "num_layers", "modules")]
    assert values == ["full", "uniform", 1, ("core_attn",)]
    assert off["recompute_granularity"] is None


def test_gradient_checkpointing_off_recomputes_nothing():
    config = load_config(["critic.model.enable_gradient_checkpointing=False"])
    assert config.critic.megatron.override_transformer_config["recompute_granularity"] is None


def test_an_explicit_granularity_wins_over_gradient_checkpointing_and_says_so():
    granularity = f"critic.{RECOMPUTE}_granularity"
    translated, notes = translate(pairs(f"{granularity}=selective", "critic.model.enable_gradient_checkpointing=True"))
    assert translated == pairs(f"{granularity}=selective")
    assert notes == [
        f"critic.model.enable_gradient_checkpointing=True is ignored: {granularity}=selective decides",
    ]


def test_the_number_of_recomputed_layers_can_be_set_beside_gradient_checkpointing():
    config = load_config([f"critic.{RECOMPUTE}_num_layers=4", "critic.model.enable_gradient_checkpointing=True"])
    settings = config.critic.megatron.override_transformer_config
    assert (settings["recompute_granularity"], settings["recompute_num_layers"]) == ("full", 4)


def test_gradient_checkpointing_must_be_a_truth_value():
    with pytest.raises(ConfigError, match=r"enable_gradient_checkpointing = 2 must be True or False"):
        load_config(["critic.model.enable_gradient_checkpointing=2"])


KEY = "critic.ppo_micro_batch_size_per_gpu"


def test_a_per_gpu_micro_batch_size_is_taken_as_it_is(caplog):
    assert resolve_micro_batch_size(4, None, 8, key=KEY) == 4
    assert caplog.records == []


def test_a_global_micro_batch_size_is_divided_with_a_warning(caplog):
    assert resolve_micro_batch_size(None, 16, 8, key=KEY) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "critic.ppo_micro_batch_size=16 is deprecated: divided by 8 data-parallel ranks it is "
        "critic.ppo_micro_batch_size_per_gpu=2; set that"
    )


@pytest.mark.parametrize(
    ("per_gpu", "global_", "message"),
    [
        (None, None, r"critic\.ppo_micro_batch_size_per_gpu is null; set it"),
        (None, 12, r"critic\.ppo_micro_batch_size = 12 is not divisible by the 8 data-parallel ranks"),
        (4, 16, r"are both set; drop critic\.ppo_micro_batch_size$"),
    ],
)
def test_a_micro_batch_size_that_cannot_be_resolved_is_refused(per_gpu, global_, message):
    with pytest.raises(ConfigError, match=message):
        resolve_micro_batch_size(per_gpu, global_, 8, key=KEY)


def test_a_mini_batch_splits_into_equal_micro_batches():
    assert check_mini_batch(path="critic", mini_batch_samples=64, micro_batch_size=4, dp_size=2) == 8
    with pytest.raises(ConfigError, match=r"critic: a mini-batch of 64 samples .* 3 data-parallel ranks"):
        check_mini_batch(path="critic", mini_batch_samples=64, micro_batch_size=4, dp_size=3)


def test_verls_profiler_keys_are_mapped_or_explained():
    config = load_config(["global_profiler.steps=[2,3]", "actor_rollout_ref.actor.profiler.ranks=[1]"])
    assert (config.trainer.profile_steps, config.trainer.profile_ranks) == ((2, 3), (1,))
    for key, advice in {
        "global_profiler.save_path": "folder profile in trainer.default_local_dir",
        "global_profiler.tool": "trainer.profile_steps alone decides",
        "global_profiler.global_tool_config.nsys.discrete": "trainer.profile_steps alone decides",
        "critic.profiler.enable": "set trainer.profile_steps and trainer.profile_ranks",
        "actor_rollout_ref.rollout.profiler.tool_config.torch.step_start": "set trainer.profile_steps",
        "trainer.worker_nsight_options.trace": "phases are NVTX ranges",
    }.items():
        with pytest.raises(ConfigError, match=advice):
            load_config([f"{key}=1"])
