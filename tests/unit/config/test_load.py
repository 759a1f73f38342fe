"""Loading: both commands of verl's SGLang page, unknown keys, types, freezing, and the way to disk and back."""

import dataclasses
import logging
import pickle
import shlex
import subprocess
import sys

import pytest

from mrl.config.errors import ConfigError
from mrl.config.load import load_config, read_config, save_config
from mrl.config.schema import PPOConfig

ONE_HOST = """
    data.train_files=$HOME/data/gsm8k/train.parquet
    data.val_files=$HOME/data/gsm8k/test.parquet
    data.train_batch_size=4096
    data.max_prompt_length=4096
    data.max_response_length=4096
    actor_rollout_ref.rollout.name=sglang
    actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.fsdp_config.param_offload=True
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.gpu_memory_utilization=0.8
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4
    critic.optim.lr=1e-5
    critic.model.path=Qwen/Qwen2-7B-Instruct
    critic.ppo_micro_batch_size_per_gpu=4
    critic.model.fsdp_config.param_offload=True
    critic.model.fsdp_config.optimizer_offload=True
    algorithm.kl_ctrl.kl_coef=0.001
    trainer.logger=['console']
    trainer.val_before_train=False
    trainer.default_hdfs_dir=null
    trainer.n_gpus_per_node=4
    trainer.nnodes=1
    trainer.save_freq=-1
    trainer.test_freq=10
    trainer.total_epochs=15
"""
TWO_HOSTS = """
    actor_rollout_ref.rollout.name=sglang
    data.train_files=$DATA_DIR/train.parquet
    data.val_files=$DATA_DIR/test.parquet
    data.train_batch_size=4096
    data.max_prompt_length=4096
    data.max_response_length=4096
    actor_rollout_ref.model.path=meta-llama/Llama-3.1-8B-Instruct
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.fsdp_config.param_offload=True
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
    actor_rollout_ref.rollout.tensor_model_parallel_size=16
    actor_rollout_ref.rollout.gpu_memory_utilization=0.8
    actor_rollout_ref.rollout.free_cache_engine=True
    actor_rollout_ref.ref.log_prob_micro_batch_size=16
    actor_rollout_ref.ref.fsdp_config.param_offload=True
    critic.optim.lr=1e-5
    critic.model.use_remove_padding=True
    critic.model.path=meta-llama/Llama-3.1-8B-Instruct
    critic.model.enable_gradient_checkpointing=True
    critic.ppo_micro_batch_size=16
    critic.model.fsdp_config.param_offload=True
    critic.model.fsdp_config.optimizer_offload=True
    algorithm.kl_ctrl.kl_coef=0.001
    trainer.critic_warmup=0
    trainer.logger=['console']
    trainer.val_before_train=True
    trainer.default_hdfs_dir=null
    trainer.n_gpus_per_node=8
    trainer.nnodes=2
    trainer.save_freq=-1
    trainer.test_freq=10
    trainer.total_epochs=15
"""


def arguments(command, *, through_shell):
    """The words of a command as a shell would pass them, or untouched but for the shell's variables."""
    expanded = command.replace("$HOME", "/home/someone").replace("$DATA_DIR", "/home/someone/data/gsm8k")
    return shlex.split(expanded) if through_shell else expanded.split()


@pytest.mark.parametrize("through_shell", [True, False])
def test_the_one_host_command_of_verls_sglang_page_loads(through_shell):
    config = load_config(arguments(ONE_HOST, through_shell=through_shell))
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.data.train_files == ("/home/someone/data/gsm8k/train.parquet",)
    assert (config.data.train_batch_size, rollout.prompt_length, rollout.response_length) == (4096, 4096, 4096)
    assert (actor.ppo_mini_batch_size, config.critic.ppo_mini_batch_size) == (64, 64)
    assert (actor.optim.lr, config.critic.optim.lr) == (1e-6, 1e-5)
    assert actor.megatron.param_offload
    assert actor.megatron.optimizer_offload
    assert config.critic.megatron.param_offload
    assert config.critic.megatron.optimizer_offload
    assert actor.megatron.override_transformer_config["recompute_granularity"] == "full"
    assert config.critic.megatron.override_transformer_config["recompute_granularity"] is None
    assert (config.trainer.logger, config.trainer.world_size) == (("console",), 4)
    assert actor.megatron.tensor_model_parallel_size is None


@pytest.mark.parametrize("through_shell", [True, False])
def test_the_two_host_command_of_verls_sglang_page_loads(through_shell):
    config = load_config(arguments(TWO_HOSTS, through_shell=through_shell))
    assert config.actor_rollout_ref.ref.log_prob_micro_batch_size == 16
    assert config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu is None
    assert (config.critic.ppo_micro_batch_size, config.critic.ppo_micro_batch_size_per_gpu) == (16, None)
    assert config.actor_rollout_ref.ref.megatron.param_offload
    assert config.critic.megatron.override_transformer_config["recompute_num_layers"] == 1
    assert (config.trainer.world_size, config.actor_rollout_ref.rollout.tensor_model_parallel_size) == (16, 16)


def test_the_one_host_command_says_that_its_kl_coefficient_does_not_act(caplog):
    with caplog.at_level(logging.INFO, logger="mrl.config"):
        load_config(arguments(ONE_HOST, through_shell=True))
    (line,) = [record.getMessage() for record in caplog.records if "kl_coef" in record.getMessage()]
    assert line.startswith("algorithm.kl_ctrl.kl_coef=0.001 does not act: algorithm.use_kl_in_reward is False")
    assert "set algorithm.use_kl_in_reward=True" in line


def test_the_demo_layout_fits_its_eight_ranks():
    config = load_config([], "demo")
    actor, critic = config.actor_rollout_ref.actor.megatron, config.critic.megatron
    assert (actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size) == (2, 2)
    assert (critic.tensor_model_parallel_size, critic.pipeline_model_parallel_size) == (1, 2)
    assert config.actor_rollout_ref.ref.megatron.tensor_model_parallel_size == 2
    assert (config.trainer.world_size, config.trainer.device) == (8, "cpu")


def test_defaults_follow_the_keys_they_are_tied_to():
    config = load_config(
        [
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4",
            "actor_rollout_ref.actor.clip_ratio=0.3",
            "actor_rollout_ref.model.path=/models/small",
            "data.max_response_length=99",
            "trainer.experiment_name=mine",
        ]
    )
    assert config.actor_rollout_ref.ref.megatron.tensor_model_parallel_size == 4
    assert config.critic.megatron.tensor_model_parallel_size is None
    assert (config.actor_rollout_ref.actor.clip_ratio_low, config.actor_rollout_ref.actor.clip_ratio_high) == (0.3, 0.3)
    assert config.critic.model.path == "/models/small"
    assert config.actor_rollout_ref.rollout.response_length == 99
    assert config.trainer.default_local_dir == "checkpoints/mrl_examples/mine"


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("data.trian_batch_size", "data.train_batch_size"),
        ("critic.clip_range_value", "critic.cliprange_value"),
        ("actor_rollout_ref.rollout.gpu_memory_utilisation", "actor_rollout_ref.rollout.gpu_memory_utilization"),
        ("actor_rollout_ref.actor.lr", "actor_rollout_ref.actor.optim.lr"),
        ("trainer.n_gpu", "trainer.n_gpus_per_node"),
        ("kl_coef", "algorithm.kl_ctrl.kl_coef"),
        ("actor_rollout_ref.actor.grad_clip", "actor_rollout_ref.actor.optim.clip_grad"),
        ("actor_rollout_ref.rollout.enable_prefix_caching", "engine_kwargs.sglang.disable_radix_cache=True"),
        ("critic.model.lora.rank", "all parameters are trained"),
        ("actor_rollout_ref.actor.strategy", "Megatron is the only training backend"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(unknown, nearest):
    with pytest.raises(ConfigError) as caught:
        load_config([f"{unknown}=1"])
    assert f"unknown key {unknown}: " in str(caught.value)
    assert nearest in str(caught.value)


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(ConfigError, match=r"(?s)data\.a:.*data\.b:"):
        load_config(["data.a=1", "data.b=2"])


def test_an_unknown_key_inside_a_mapping_value_is_refused():
    with pytest.raises(ConfigError, match=r"val_kwargs\.temprature: did you mean .*val_kwargs\.temperature"):
        load_config(["actor_rollout_ref.rollout.val_kwargs={temprature: 1.0}"])


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_plus_signs_neither_refuse_known_keys_nor_admit_unknown_ones(prefix):
    assert load_config([f"{prefix}trainer.seed=7"]).trainer.seed == 7
    engine = "actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend"
    config = load_config([f"{prefix}{engine}=triton"])
    assert config.actor_rollout_ref.rollout.engine_kwargs.sglang == {"attention_backend": "triton"}
    with pytest.raises(ConfigError, match=r"unknown key trainer\.sed"):
        load_config([f"{prefix}trainer.sed=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_size=many", r"data\.train_batch_size = 'many' must be an integer"),
        ("data.train_batch_size=1.5", r"data\.train_batch_size = 1\.5 must be an integer"),
        ("data.train_batch_size=null", r"data\.train_batch_size = None must be an integer"),
        ("trainer.nnodes=True", r"trainer\.nnodes = True must be an integer"),
        ("data.shuffle=1", r"data\.shuffle = 1 must be True or False"),
        ("actor_rollout_ref.actor.optim.betas=[0.9]", r"actor\.optim\.betas = .* must be a list of a number, a number"),
        ("trainer.logger=[console,mlflow]", r"trainer\.logger\[1\] = 'mlflow' must be one of 'console', 'tensorboard'"),
        ("actor_rollout_ref.rollout.name=vllm", r"rollout\.name = 'vllm' must be one of 'sglang'"),
        ("algorithm.adv_estimator=grop", r"algorithm\.adv_estimator = 'grop' must be one of 'gae'"),
        ("algorithm.kl_penalty=k4", r"algorithm\.kl_penalty = 'k4' must be one of 'kl', 'k1'"),
        ("algorithm.kl_ctrl=3", r"algorithm\.kl_ctrl = 3 is a section"),
        ("actor_rollout_ref.rollout.engine_kwargs.sglang=3", r"engine_kwargs\.sglang = 3 must be a mapping"),
        ("data.val_batch_size=${data.nothing}", "cannot compose"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.seed", "must be key=value"),
        ("data.prompt_key=a=b", "needs quotes"),
        ("~data.seed", "cannot be deleted"),
        ("trainer.seed=1,2", "sweeps are not supported"),
        ("optim=muon", "cannot compose"),
    ],
)
def test_a_malformed_override_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([override])


def test_an_unknown_configuration_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="there are demo, ppo_megatron_trainer"):
        load_config([], "ppo_trainer")


def test_values_may_be_lists_home_paths_and_interpolations():
    files = ["data.train_files=[/a/1.parquet,/a/2.parquet]", "data.val_files=~/v.parquet"]
    config = load_config([*files, "data.val_batch_size=${data.train_batch_size}"])
    assert config.data.train_files == ("/a/1.parquet", "/a/2.parquet")
    assert config.data.val_files == ("~/v.parquet",)
    assert config.data.val_batch_size == 1024


def test_the_configuration_is_frozen_at_every_depth():
    config = load_config(["+reward.custom_reward_function.reward_kwargs.weights={a: [1, 2]}"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.trainer.seed = 1
    kwargs = config.reward.custom_reward_function.reward_kwargs
    with pytest.raises(TypeError, match="frozen after loading"):
        kwargs["weights"] = {}
    with pytest.raises(TypeError, match="frozen after loading"):
        kwargs["weights"].update(b=1)
    assert kwargs["weights"]["a"] == (1, 2)


def test_saving_and_reading_gives_the_same_configuration(tmp_path):
    config = load_config([*arguments(TWO_HOSTS, through_shell=True), "+data.apply_chat_template_kwargs.tags=[a,b]"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert "${" not in (tmp_path / "config.yaml").read_text()
    assert pickle.loads(pickle.dumps(config)) == config
    assert config != PPOConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "is not a mapping"), ("trainer: {sed: 1}\n", r"trainer\.sed: did you mean trainer\.seed")],
)
def test_a_broken_saved_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "config.yaml")


def test_a_missing_saved_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read configuration"):
        read_config(tmp_path / "config.yaml")


def test_loading_imports_no_torch():
    heavy = "{'torch', 'megatron', 'sglang', 'ray'}"
    code = f"import sys, mrl.config.load, mrl.config.batch; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
