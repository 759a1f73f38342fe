"""Settings without effect: each is reported when it does nothing, and only then."""

import pytest

from mrl.config.inert import find_inert_on_cpu, find_inert_settings, find_inert_without_ray
from mrl.config.keys import find_leaf
from mrl.config.load import load_config

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))
CORRECTION = "algorithm.rollout_correction"
DYNAMIC = f"{ACTOR}.use_dynamic_bsz=True"
NO_VALIDATION = "trainer.val_before_train=False"


def report(*overrides):
    """What loading these overrides says of settings that do not act."""
    set_keys = {find_leaf(override.lstrip("+").partition("=")[0]) for override in overrides}
    return find_inert_settings(load_config(overrides), set_keys=set_keys)


# The setting that does nothing, what surrounds it, the reason, and what would make it act.
CASES = [
    (
        "reward.reward_model.weight=0.5",
        [],
        "no reward model is built",
        ["reward.reward_model.enable=True", "reward.reward_model.model_path=/x"],
    ),
    (
        "reward.sandbox=True",
        ["reward.judge.url=http://host:30000/v1"],
        "only models do",
        ["reward.functions.rule={}"],
    ),
    (
        "reward.pass_environment=[API_KEY]",
        ["reward.judge.url=http://host:30000/v1"],
        "only models do",
        ["reward.functions.rule={}"],
    ),
    ("reward.judge.max_new_tokens=4", [], "no judge is asked", ["reward.judge.url=http://host:30000/v1"]),
    (
        "reward.verifiers.my_task=exact_match",
        ["reward.functions.a={verifier: gsm8k}"],
        "no reward is left to the verifier of each sample's data source",
        ["reward.functions.b={}"],
    ),
    ("algorithm.kl_ctrl.kl_coef=0.001", [], "set algorithm.use_kl_in_reward=True", ["algorithm.use_kl_in_reward=True"]),
    ("algorithm.kl_penalty=k3", [], "no KL penalty is subtracted", ["algorithm.use_kl_in_reward=True"]),
    (
        "algorithm.kl_ctrl.target_kl=0.2",
        ["algorithm.use_kl_in_reward=True"],
        "the coefficient is fixed",
        ["algorithm.kl_ctrl.type=adaptive"],
    ),
    ("critic.ppo_epochs=2", ["algorithm.adv_estimator=remax"], "no critic is built", ["algorithm.adv_estimator=gae"]),
    (
        "trainer.max_critic_ckpt_to_keep=2",
        ["algorithm.adv_estimator=remax", "trainer.save_freq=5"],
        "no critic is built",
        ["algorithm.adv_estimator=gae"],
    ),
    (
        "algorithm.gamma=0.9",
        ["algorithm.adv_estimator=remax"],
        "does not discount",
        ["algorithm.adv_estimator=reinforce_plus_plus"],
    ),
    (
        "algorithm.lam=0.9",
        ["algorithm.adv_estimator=reinforce_plus_plus"],
        "a setting of algorithm.adv_estimator=gae",
        ["algorithm.adv_estimator=gae"],
    ),
    (
        "algorithm.norm_adv_by_std_in_grpo=False",
        [],
        "adv_estimator=grpo",
        ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=2"],
    ),
    ("data.gen_batch_size=8", [], "every prompt is kept", ["algorithm.filter_groups.enable=True", f"{ROLLOUT}.n=2"]),
    (
        "algorithm.filter_groups.metric=acc",
        [f"{ROLLOUT}.n=2"],
        "every prompt is kept",
        ["algorithm.filter_groups.enable=True"],
    ),
    (
        "reward.reward_kwargs.max_resp_len=100",
        [],
        "long responses are not penalised",
        ["reward.reward_kwargs.overlong_buffer_cfg={enable:True,len:4,penalty_factor:1.0}"],
    ),
    ("reward.reward_manager.name=dapo", [], "alone turns DAPO's penalty on", None),
    (f"{ACTOR}.kl_loss_coef=0.001", [], "the loss has no KL term", [f"{ACTOR}.use_kl_loss=True"]),
    (f"{ACTOR}.kl_loss_type=k2", [], "the loss has no KL term", [f"{ACTOR}.use_kl_loss=True"]),
    (f"{REF}.log_prob_micro_batch_size_per_gpu=4", [], "no reference model is built", [f"{ACTOR}.use_kl_loss=True"]),
    (
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
        [f"{ACTOR}.use_dynamic_bsz=True"],
        "ppo_max_token_len_per_gpu limits micro-batches",
        [f"{ACTOR}.use_dynamic_bsz=False"],
    ),
    (f"{ACTOR}.ppo_max_token_len_per_gpu=4096", [], "set actor_rollout_ref.actor.use_dynamic_bsz=True", [DYNAMIC]),
    (f"{ROLLOUT}.log_prob_max_token_len_per_gpu=4096", [], "use_dynamic_bsz is False", [DYNAMIC]),
    (
        f"{REF}.log_prob_micro_batch_size=4",
        [DYNAMIC, f"{ACTOR}.use_kl_loss=True"],
        "log_prob_max_token_len_per_gpu limits micro-batches",
        [f"{REF}.log_prob_use_dynamic_bsz=False"],
    ),
    ("critic.forward_max_token_len_per_gpu=4096", [], "use_dynamic_bsz is False", [DYNAMIC]),
    (
        "critic.forward_micro_batch_size_per_gpu=4",
        [DYNAMIC],
        "forward_max_token_len_per_gpu limits micro-batches",
        ["critic.use_dynamic_bsz=False"],
    ),
    (f"{REF}.megatron.param_offload=True", [], "no reference model is built", ["algorithm.use_kl_in_reward=True"]),
    (
        f"{ACTOR}.clip_ratio=0.3",
        [f"{ACTOR}.clip_ratio_low=0.1", f"{ACTOR}.clip_ratio_high=0.4"],
        "take precedence",
        [f"{ACTOR}.clip_ratio_high=${{.clip_ratio}}"],
    ),
    (f"{ACTOR}.tau_pos=2", [], "loss_mode=sapo takes it", [f"{ACTOR}.policy_loss.loss_mode=sapo"]),
    (
        f"{ACTOR}.clip_ratio_high=0.28",
        [f"{ACTOR}.policy_loss.loss_mode=gpg"],
        "takes it",
        [f"{ACTOR}.policy_loss.loss_mode=cispo"],
    ),
    (
        f"{ACTOR}.clip_ratio_c=5",
        [f"{ACTOR}.policy_loss.loss_mode=gspo"],
        "takes it",
        [f"{ACTOR}.policy_loss.loss_mode=dppo_tv"],
    ),
    (
        f"{ACTOR}.policy_loss.kl_cov_ratio=0.1",
        [],
        "loss_mode=kl_cov takes it",
        [f"{ACTOR}.policy_loss.loss_mode=kl_cov"],
    ),
    (
        f"{ACTOR}.loss_agg_mode=token-sum",
        [f"{ACTOR}.policy_loss.loss_mode=sapo", "critic.loss_agg_mode=token-mean"],
        "no other term",
        [f"{ACTOR}.entropy_coeff=0.01"],
    ),
    (f"{CORRECTION}.loss_type=reinforce", [], "bypass_mode is False", [f"{CORRECTION}.bypass_mode=True"]),
    (
        f"{CORRECTION}.rollout_is=token",
        [f"{CORRECTION}.bypass_mode=True"],
        "that of trainer to engine already",
        [f"{CORRECTION}.loss_type=reinforce"],
    ),
    (
        f"{CORRECTION}.rollout_is_batch_normalize=True",
        [],
        "there are no weights",
        [f"{CORRECTION}.rollout_is=sequence"],
    ),
    (f"{CORRECTION}.rollout_rs_threshold=2", [], "nothing is rejected", [f"{CORRECTION}.rollout_rs=token_k1"]),
    (
        f"{ACTOR}.clip_ratio_high=0.3",
        [f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=reinforce"],
        "takes it",
        [f"{CORRECTION}.loss_type=ppo_clip"],
    ),
    (
        f"{ACTOR}.loss_scale_factor=100",
        [],
        "seq-mean-token-sum-norm only",
        [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm"],
    ),
    (
        "critic.loss_scale_factor=100",
        [],
        "seq-mean-token-sum-norm only",
        ["critic.loss_agg_mode=seq-mean-token-sum-norm"],
    ),
    (f"{ACTOR}.optim.min_lr=1e-8", [], "the learning rate is constant", [f"{ACTOR}.optim.lr_decay_style=cosine"]),
    ("critic.optim.min_lr=1e-8", [], "the learning rate is constant", ["critic.optim.lr_decay_style=linear"]),
    (
        "critic.optim.lr_warmup_steps_ratio=0.1",
        ["critic.optim.lr_warmup_steps=5"],
        "takes precedence",
        ["critic.optim.lr_warmup_steps=-1"],
    ),
    (
        f"{ACTOR}.optim.total_training_steps=100",
        [],
        "no warm-up is given as a ratio",
        [f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1"],
    ),
    (
        f"{ACTOR}.megatron.dist_checkpointing_path=/c",
        [],
        "weights are those of the model's folder",
        [f"{ACTOR}.megatron.use_dist_checkpointing=True"],
    ),
    (f"{ROLLOUT}.mode=async", [], "engines run in-process", None),
    (f"{ROLLOUT}.load_format=auto", [], "leave it at dummy", [f"{ROLLOUT}.load_format=dummy"]),
    (f"{ROLLOUT}.val_kwargs.temperature=0.5", [NO_VALIDATION], "does not validate", ["trainer.test_freq=5"]),
    ("trainer.log_val_generations=3", [NO_VALIDATION], "does not validate", ["trainer.test_freq=5"]),
    ("data.val_batch_size=3", [NO_VALIDATION], "does not validate", ["trainer.val_only=True"]),
    ("data.seed=3", ["data.shuffle=False"], "data.shuffle is False", ["data.shuffle=True"]),
    (
        "data.truncation=left",
        ["data.filter_overlong_prompts=True"],
        "no over-long prompt is left",
        ["data.filter_overlong_prompts=False"],
    ),
    ("data.return_raw_chat=False", [], "are kept with every prompt", ["data.return_raw_chat=True"]),
    ("reward.custom_reward_function.name=f", [], "path is null", ["reward.custom_reward_function.path=/r.py"]),
    (
        "+reward.custom_reward_function.reward_kwargs.a=1",
        [],
        "path is null",
        ["reward.custom_reward_function.path=/r.py"],
    ),
    ("trainer.default_hdfs_dir=hdfs://x", [], "nothing is copied to HDFS", ["trainer.default_hdfs_dir=null"]),
    (f"{ACTOR}.checkpoint.save_contents=[model,optimizer,extra,hf_model]", [], "saves no", ["trainer.save_freq=5"]),
    (f"{ACTOR}.checkpoint.async_save=True", [], "saves no checkpoint", ["trainer.save_freq=5"]),
    ("critic.checkpoint.async_save=True", [], "saves no checkpoint", ["trainer.save_freq=5"]),
    (
        "critic.checkpoint.load_contents=[model]",
        ["trainer.resume_mode=disable"],
        "no checkpoint is loaded",
        ["trainer.resume_mode=auto"],
    ),
    ("trainer.max_actor_ckpt_to_keep=2", [], "the run saves no checkpoint", ["trainer.save_freq=5"]),
    ("trainer.max_critic_ckpt_to_keep=2", [], "the run saves no checkpoint", ["trainer.save_freq=5"]),
    ("trainer.resume_from_path=/c", [], "is not resume_path", ["trainer.resume_mode=resume_path"]),
    (
        "trainer.ray_wait_register_center_timeout=9",
        ["trainer.launcher=local"],
        "there is no other host",
        ["trainer.launcher=ray"],
    ),
    ("trainer.profile_ranks=[1]", [], "names no step", ["trainer.profile_steps=[1]"]),
    ("trainer.profile_steps=[1]", ["trainer.val_only=True"], "no step is made", ["trainer.val_only=False"]),
    ("trainer.network_interface=ib0", [], "there is no other host", ["trainer.nnodes=2"]),
    ("ray_kwargs.ray_init.num_cpus=4", ["trainer.launcher=slurm"], "launcher is not ray", ["trainer.launcher=auto"]),
    (
        "actor_rollout_ref.model.use_remove_padding=True",
        [f"{ACTOR}.megatron.use_remove_padding=False"],
        "takes precedence",
        [f"{ACTOR}.megatron.use_remove_padding=True"],
    ),
    (
        "critic.model.use_remove_padding=False",
        ["critic.megatron.use_remove_padding=True"],
        "takes precedence",
        ["critic.megatron.use_remove_padding=False"],
    ),
    (f"{ACTOR}.megatron.optimizer_offload=True", ["trainer.device=cpu"], "no device memory", ["trainer.device=cuda"]),
    (
        "reward.reward_model.megatron.param_offload=True",
        ["trainer.device=cpu", "reward.reward_model.enable=True", "reward.reward_model.model_path=/x"],
        "no device memory",
        ["trainer.device=cuda"],
    ),
    ("critic.megatron.param_offload=True", ["trainer.device=cpu"], "no device memory", ["trainer.device=auto"]),
    (
        f"{ROLLOUT}.multi_turn.max_turn_length=64",
        [],
        "the model answers once",
        [f"{ROLLOUT}.multi_turn.enable=True", f"{ROLLOUT}.multi_turn.environment.path=/x"],
    ),
    (
        f"{ROLLOUT}.multi_turn.environment.path=/x",
        [],
        "set actor_rollout_ref.rollout.multi_turn.enable=True",
        [f"{ROLLOUT}.multi_turn.enable=True", f"{ROLLOUT}.multi_turn.max_turn_length=64"],
    ),
    (
        f"{ROLLOUT}.enable_rollout_routing_replay=True",
        [],
        "router_replay.mode is disabled; set it to R3",
        [f"{ACTOR}.megatron.router_replay.mode=R3"],
    ),
    (f"{ROLLOUT}.enforce_eager=True", ["trainer.device=cpu"], "no CUDA graphs", ["trainer.device=cuda"]),
    (f"{ROLLOUT}.free_cache_engine=True", ["trainer.device=cpu"], "no CUDA graphs", ["trainer.device=cuda"]),
]


@pytest.mark.parametrize(("setting", "around", "reason", "remedy"), CASES)
def test_a_setting_without_effect_is_reported_until_it_acts(setting, around, reason, remedy):
    key = find_leaf(setting.lstrip("+").partition("=")[0])
    (line,) = [line for line in report(*around, setting) if f"{key}=" in line]
    assert " does not act: " in line
    assert reason in line
    if remedy is not None:
        assert not [line for line in report(*around, setting, *remedy) if f"{key}=" in line.partition(" does not")[0]]


def test_a_default_that_does_not_act_is_reported_only_when_the_user_names_it():
    assert find_inert_settings(load_config([])) == []
    assert find_inert_settings(load_config(["algorithm.kl_ctrl.kl_coef=0.001"])) == []
    assert len(find_inert_settings(load_config(["algorithm.kl_ctrl.kl_coef=0.002"]))) == 1


def test_an_inherited_value_is_not_reported_as_the_users():
    actor = [f"{ACTOR}.megatron.tensor_model_parallel_size=2", f"{ACTOR}.loss_scale_factor=100"]
    lines = report(*actor, f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", "critic.loss_agg_mode=token-mean")
    assert lines == []


def test_a_clip_ratio_that_one_side_follows_acts():
    assert report(f"{ACTOR}.clip_ratio=0.3", f"{ACTOR}.clip_ratio_high=0.4") == []


def test_the_demo_sets_nothing_that_does_not_act():
    assert find_inert_settings(load_config([], "demo")) == []


def test_settings_for_gpus_can_be_asked_for_once_the_device_is_known():
    config = load_config(["critic.megatron.grad_offload=True"])
    assert find_inert_settings(config) == []
    lines = find_inert_on_cpu(config)
    assert any(line.startswith("critic.megatron.grad_offload=True does not act") for line in lines)


def test_settings_of_ray_are_reported_where_another_launcher_is_found():
    own = ["ray_kwargs.ray_init.num_cpus=4", "trainer.ray_wait_register_center_timeout=9"]
    ray, wait = find_inert_without_ray(load_config(own))
    assert ray.startswith("ray_kwargs.ray_init={'num_cpus': 4} does not act: the job does not run on Ray")
    assert wait.startswith("trainer.ray_wait_register_center_timeout=9 does not act")
    assert find_inert_without_ray(load_config([*own[1:], "trainer.nnodes=2"])) == []
