"""The schema: one source of defaults with the YAML files, contradictions refused, the key table up to date."""

import json
from pathlib import Path

import pytest

from mrl.config.actor import ActorConfig
from mrl.config.algorithm import KLCtrlConfig
from mrl.config.build import config_to_dict
from mrl.config.docs import field_docs, render_key_table
from mrl.config.errors import ConfigError
from mrl.config.keys import flatten, iterate_keys
from mrl.config.load import compose_values, load_config
from mrl.config.schema import PPOConfig

ROOT = Path(__file__).parents[3]
ACTOR = "actor_rollout_ref.actor"
CORRECTION = "algorithm.rollout_correction"


def test_yaml_files_hold_every_key_of_the_schema_with_its_default():
    schema = flatten(PPOConfig())
    assert sorted(_leaves(compose_values("ppo_megatron_trainer"), set(schema))) == sorted(schema)
    assert flatten(load_config([])) == schema


def _leaves(values, schema_keys, prefix=""):
    for name, value in values.items():
        key = prefix + name
        if key not in schema_keys and isinstance(value, dict):
            yield from _leaves(value, schema_keys, f"{key}.")
        else:
            yield key


def test_every_field_has_a_docstring_of_its_own_or_inherited():
    undocumented = [key for key, section, name, _ in iterate_keys() if not field_docs(section).get(name)]
    assert undocumented == []


def test_the_key_table_is_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == render_key_table(), (
        "run python -m mrl.config.docs docs/config.md"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (f"{ACTOR}.policy_loss.loss_mode=gsp0", r"policy_loss\.loss_mode = 'gsp0' must be one of 'vanilla', 'gspo'"),
        (f"{ACTOR}.policy_loss.loss_mode=dro", r"policy_loss\.dro_beta = null, but loss_mode = dro needs one"),
        (f"{ACTOR}.policy_loss.clip_cov_lb=6", r"clip_cov_lb = 6\.0 must be below clip_cov_ub = 5\.0"),
        (f"{ACTOR}.policy_loss.kl_cov_ratio=2", r"policy_loss\.kl_cov_ratio = 2\.0 must be at most 1"),
        (f"{ACTOR}.clip_ratio_low=1.5", r"actor\.clip_ratio_low = 1\.5 must be at most 1"),
        (
            f"{CORRECTION}.bypass_mode=True {CORRECTION}.rollout_is=token {CORRECTION}.rollout_is_batch_normalize=True",
            r"rollout_correction\.rollout_is_batch_normalize = True, but bypass_mode = True",
        ),
        (
            f"{CORRECTION}.bypass_mode=True {ACTOR}.policy_loss.loss_mode=gspo",
            r"bypass_mode = True chooses the loss by loss_type = ppo_clip, but .*loss_mode = gspo",
        ),
        (
            f"{CORRECTION}.rollout_is=token {CORRECTION}.rollout_is_threshold=0.5_5.0 "
            f"{ACTOR}.policy_loss.loss_mode=geo_mean",
            r"rollout_is_threshold = 0\.5_5\.0 sets weights of tokens to 0",
        ),
        (
            f"{CORRECTION}.rollout_is_threshold=0.5_5",
            r"rollout_is_threshold = 0\.55 leaves out the ratio 1.*quotes",
        ),
        (f"{CORRECTION}.rollout_is_threshold=two", r"rollout_is_threshold = 'two' must be a number, or two"),
        (f"{CORRECTION}.rollout_is_threshold=-1", r"rollout_is_threshold = -1\.0 must be positive"),
        (
            f"{CORRECTION}.rollout_rs=seq_max_k1",
            r"rollout_rs = 'seq_max_k1' is unknown; choose from token_k1, ",
        ),
        (
            f"{CORRECTION}.rollout_rs=token_k1",
            r"_threshold has 0 bound.s., but rollout_rs has 1 test.s.: token_k1",
        ),
        (
            f"{CORRECTION}.rollout_rs=[token_k1,token_k2,token_k3] {CORRECTION}.rollout_rs_threshold=[2,3]",
            r"rollout_rs_threshold has 2 bound.s., but rollout_rs has 3 test.s.: token_k1, token_k2, token_k3",
        ),
        (
            f"{CORRECTION}.rollout_rs=token_k2 {CORRECTION}.rollout_rs_threshold=0.5_2.0",
            r"rollout_rs_threshold of token_k2 = '0\.5_2\.0': a divergence has an upper bound only",
        ),
        (
            f"{CORRECTION}.rollout_rs=seq_mean_k1 {CORRECTION}.rollout_rs_threshold=1.1_1.2",
            r"rollout_rs_threshold of seq_mean_k1 = '1\.1_1\.2' leaves out the ratio 1",
        ),
        ("data.train_batch_size=32", r"ppo_mini_batch_size = 256 is larger than data\.train_batch_size = 32"),
        ("data.train_batch_size=300", r"ppo_mini_batch_size = 256 does not divide data\.train_batch_size = 300"),
        ("critic.ppo_mini_batch_size=300", r"critic\.ppo_mini_batch_size = 300 does not divide"),
        ("algorithm.adv_estimator=grpo", r"adv_estimator = grpo compares .*rollout\.n = 1; set it to at least 2"),
        ("algorithm.adv_estimator=rloo_vectorized", r"adv_estimator = rloo_vectorized compares"),
        ("algorithm.filter_groups.enable=True", r"filter_groups\.enable needs responses to compare, .*rollout\.n = 1"),
        (
            "algorithm.filter_groups.enable=True actor_rollout_ref.rollout.n=2 algorithm.use_kl_in_reward=True "
            "algorithm.filter_groups.metric=seq_final_reward",
            r"seq_final_reward is known only after the KL penalty",
        ),
        (
            "algorithm.filter_groups.enable=True actor_rollout_ref.rollout.n=2 data.gen_batch_size=256 "
            "algorithm.filter_groups.max_num_gen_batches=3",
            r"max_num_gen_batches = 3 batches of 256 prompts can never fill data\.train_batch_size = 1024",
        ),
        (
            "reward.reward_kwargs.overlong_buffer_cfg={enable:True,len:600,penalty_factor:1.0}",
            r"overlong_buffer_cfg\.len = 600, max_resp_len = 512 and data\.max_response_length = 512",
        ),
        (
            "reward.reward_kwargs.overlong_buffer_cfg={enable:True,len:4,penalty_factor:1.0} "
            "reward.reward_kwargs.max_resp_len=600",
            r"max_resp_len = 600 and data\.max_response_length = 512",
        ),
        (
            "reward.reward_kwargs.overlong_buffer_cfg.enable=True",
            r"len = 0 and penalty_factor = 0 must be positive",
        ),
        (
            "algorithm.adv_estimator=remax trainer.critic_warmup=3",
            r"trainer\.critic_warmup = 3, but algorithm\.adv_estimator = remax has no critic",
        ),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3", r"= 3 does not divide a mini-batch of 256 samples"),
        ("critic.ppo_micro_batch_size=3", r"critic\.ppo_micro_batch_size = 3 does not divide a mini-batch"),
        (
            "critic.ppo_micro_batch_size=4 critic.ppo_micro_batch_size_per_gpu=4",
            r"critic\.ppo_micro_batch_size_per_gpu = 4 and ppo_micro_batch_size = 4 are both set",
        ),
        (
            "actor_rollout_ref.ref.log_prob_micro_batch_size=4 "
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
            r"ref\.log_prob_micro_batch_size_per_gpu = 4 and log_prob_micro_batch_size = 4 are both set",
        ),
        (
            "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1000",
            r"actor\.ppo_max_token_len_per_gpu = 1000 is less than the longest sample, data\.max_prompt_length \+ "
            r"data\.max_response_length = 1024, which cannot be split; raise it to 1024 or more",
        ),
        (
            "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.megatron.context_parallel_size=2 "
            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=500",
            r"rollout\.log_prob_max_token_len_per_gpu = 500 on each of 2 context-parallel GPUs .* raise it to 512",
        ),
        (
            "algorithm.use_kl_in_reward=True actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True "
            "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=9",
            r"ref\.log_prob_max_token_len_per_gpu = 9 is less",
        ),
        (
            "critic.use_dynamic_bsz=True critic.forward_max_token_len_per_gpu=9",
            r"critic\.forward_max_token_len_per_gpu = 9 is less",
        ),
        (
            "critic.forward_micro_batch_size=4 critic.forward_micro_batch_size_per_gpu=4",
            r"critic\.forward_micro_batch_size_per_gpu = 4 and forward_micro_batch_size = 4 are both set",
        ),
        ("actor_rollout_ref.rollout.response_length=9", r"response_length = 9 and data\.max_response_length = 512"),
        ("actor_rollout_ref.rollout.num_engines=5", r"5 engine\(s\) of tensor_model_parallel_size = 2 need 10 ranks"),
        (
            "actor_rollout_ref.rollout.max_model_len=1023",
            r"max_model_len = 1023 is less than data\.max_prompt_length \+ data\.max_response_length = 1024",
        ),
        (
            "actor_rollout_ref.rollout.dtype=float32",
            r"actor\.megatron\.dtype = bfloat16, but actor_rollout_ref\.rollout\.dtype = float32: .* both to the same",
        ),
        ("actor_rollout_ref.actor.megatron.dtype=float16", r"dtype = 'float16' must be one of 'bfloat16', 'float32'"),
        ("trainer.n_gpus_per_node=1", r"need 2 ranks, but trainer\.nnodes x trainer\.n_gpus_per_node = 1"),
        ("data.val_files=[]", r"data\.val_files is empty, but the run validates"),
        ("data.train_files=[]", r"data\.train_files is empty"),
        ("trainer.launcher=local trainer.nnodes=2", r"trainer\.launcher = local .* nnodes = 2"),
        ("trainer.resume_mode=resume_path", r"trainer\.resume_mode = resume_path needs resume_from_path"),
        ("trainer.max_restarts=1", r"trainer\.max_restarts = 1 .* needs save_freq > 0 .*, not -1 and auto"),
        (
            "trainer.max_restarts=1 trainer.save_freq=1 trainer.resume_mode=disable",
            r"resume_mode = auto, not 1 and disable",
        ),
        (
            "trainer.phase_timeouts_s={rolout:60}",
            r"trainer\.phase_timeouts_s names phase 'rolout'; there are start",
        ),
        ("trainer.phase_timeouts_s={rollout:0}", r"trainer\.phase_timeouts_s\.rollout = 0 must be above 0"),
        ("trainer.profile_steps=[0]", r"trainer\.profile_steps names step 0; steps count from 1"),
        ("trainer.profile_steps=3", r"trainer\.profile_steps = 3 must be a list, each item an integer or null"),
        (
            "trainer.profile_steps=[2,5] trainer.total_training_steps=4",
            r"trainer\.profile_steps names step 5; the run has 4",
        ),
        (
            "trainer.profile_steps=[1] trainer.profile_ranks=[8]",
            r"names rank 8; the job has ranks 0 to 7",
        ),
        ("trainer.profile_ranks=[-1]", r"trainer\.profile_ranks names rank -1"),
        ("trainer.profile_steps=[1] trainer.profile_ranks=[]", r"trainer\.profile_ranks is empty"),
        ("actor_rollout_ref.rollout.max_engine_restarts=-1", r"max_engine_restarts = -1 must be at least 0"),
        (
            "actor_rollout_ref.rollout.alias_weights=True "
            "+actor_rollout_ref.rollout.engine_kwargs.sglang.speculative_algorithm=EAGLE",
            r"speculative_algorithm = 'EAGLE' needs weights of the engine's own; set alias_weights=False",
        ),
        (
            "actor_rollout_ref.actor.megatron.router_replay.mode=R2",
            r"router_replay\.mode = 'R2' must be one of 'disabled', 'R3'",
        ),
        (
            "actor_rollout_ref.actor.megatron.router_replay.mode=R3 "
            "+actor_rollout_ref.rollout.engine_kwargs.sglang.speculative_algorithm=EAGLE",
            r"router_replay\.mode = R3 needs every token's experts.*speculative_algorithm = 'EAGLE'; drop one",
        ),
        (
            "actor_rollout_ref.actor.megatron.router_replay.mode=R3 "
            "+actor_rollout_ref.rollout.engine_kwargs.sglang.chunked_prefill_size=-1",
            r"does not report all of them with engine_kwargs\.sglang\.chunked_prefill_size = -1",
        ),
        (
            "actor_rollout_ref.actor.megatron.router_replay.record_file=/x",
            r"record_file: drop it: .* no file is needed",
        ),
        (
            "critic.megatron.router_replay.mode=R3",
            r"critic\.megatron\.router_replay\.mode: drop it: this role's routers",
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.enable=True",
            r"rollout\.multi_turn\.enable = True needs environment\.path, a Python file",
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.enable=True actor_rollout_ref.rollout.multi_turn.environment.path=/x",
            r"enable = True needs max_assistant_turns or max_turn_length",
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.enable=True "
            "actor_rollout_ref.rollout.multi_turn.environment.path=/x "
            "actor_rollout_ref.rollout.multi_turn.max_turn_length=600",
            r"max_turn_length = 600 is more than a whole conversation may have: data\.max_response_length = 512",
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.enable=True "
            "actor_rollout_ref.rollout.multi_turn.environment.path=/x "
            "actor_rollout_ref.rollout.multi_turn.max_turn_length=64 actor_rollout_ref.rollout.ignore_eos=True",
            r"multi_turn\.enable needs answers that end, and rollout\.ignore_eos = True cuts all",
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.tool_config_path=/tools.yaml",
            r"multi_turn\.tool_config_path: set actor_rollout_ref\.rollout\.multi_turn\.environment\.path",
        ),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.sglang.base_gpu_id=1",
            r"engine_kwargs\.sglang\.base_gpu_id = 1: engines run on the GPUs of their own ranks; drop it",
        ),
        ("trainer.max_actor_ckpt_to_keep=0", r"trainer\.max_actor_ckpt_to_keep = 0 must be at least 1"),
        (
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]",
            r"actor\.checkpoint\.save_contents = \['model', 'hf_model'\] lacks 'optimizer'",
        ),
        (
            "critic.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
            r"critic\.checkpoint\.save_contents = .* names 'hf_model', but a value head",
        ),
        (
            "critic.checkpoint.load_contents=[optimizer,extra]",
            r"critic\.checkpoint\.load_contents = \['optimizer', 'extra'\] lacks 'model'",
        ),
        (
            "actor_rollout_ref.actor.checkpoint.load_contents=[model,hf_model]",
            r"actor\.checkpoint\.load_contents = \['model', 'hf_model'\] names 'hf_model'.*model\.path",
        ),
        ("actor_rollout_ref.actor.checkpoint.save_lora_only=True", r"save_lora_only: drop it: there are no LoRA"),
        (
            "+critic.megatron.override_transformer_config.moe_aux_loss_coeff=0.01",
            r"critic\.megatron\.override_transformer_config\.moe_aux_loss_coeff: not supported, known are recompute_",
        ),
        ("+critic.megatron.override_ddp_config.num_buckets=2", r"override_ddp_config\.num_buckets: not supported"),
        ("+critic.optim.override_optimizer_config.lr=2", r"override_optimizer_config\.lr: not supported.* adam_eps"),
        ("trainer.critic_warmup=5 trainer.total_training_steps=5", r"critic_warmup = 5 leaves no step for the actor"),
        ("critic.optim.min_lr=1", r"critic\.optim\.min_lr = 1\.0 is above lr = 1e-05"),
        ("critic.optim.betas=[0.9,1.0]", r"critic\.optim\.betas = \[0\.9, 1\.0\] must lie in"),
        ("actor_rollout_ref.rollout.temperature=0", r"rollout\.temperature = 0\.0 must be greater than 0"),
        ("actor_rollout_ref.rollout.top_p=0", r"rollout\.top_p = 0\.0 must lie in"),
        ("actor_rollout_ref.rollout.val_kwargs.top_k=0", r"val_kwargs\.top_k = 0 must be at least 1, or -1"),
        ("actor_rollout_ref.rollout.val_kwargs.n=2", r"val_kwargs\.n = 2 greedy responses are all the same"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization=8", r"gpu_memory_utilization = 8\.0 must lie in \[0, 1\]"),
        ("actor_rollout_ref.actor.clip_ratio_c=1", r"actor\.clip_ratio_c = 1\.0 must be greater than 1"),
        ("algorithm.lam=1.5", r"algorithm\.lam = 1\.5 must lie in \[0, 1\]"),
        ("critic.megatron.tensor_model_parallel_size=0", r"critic\.megatron\.tensor_model_parallel_size = 0 must be"),
        (
            "critic.megatron.use_dist_checkpointing=True",
            r"critic\.megatron\.use_dist_checkpointing = True needs dist_checkpointing_path",
        ),
        ("data.train_max_samples=0", r"data\.train_max_samples = 0 must be at least 1, or -1"),
        ("reward.timeout_s=0", r"reward\.timeout_s = 0\.0 must be greater than 0"),
        (
            "critic.megatron.override_transformer_config.recompute_granularity=full",
            r"critic\.megatron\.override_transformer_config\.recompute_granularity = 'full' needs",
        ),
        (
            "critic.megatron.override_transformer_config.recompute_num_layers=2",
            r"recompute_num_layers = 2 act only with .*recompute_granularity = 'full'",
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_numbers(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides.split(" "))


def test_what_is_not_used_is_not_checked():
    load_config(["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1", "critic.forward_max_token_len_per_gpu=1"])
    dynamic = ["actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024"]
    load_config([*dynamic, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3"])


def test_several_samples_per_prompt_widen_the_mini_batch():
    config = load_config(["actor_rollout_ref.rollout.n=3", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3"])
    assert config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 3


def test_sections_check_themselves_when_built_in_code():
    assert KLCtrlConfig(kl_coef=1).kl_coef == 1.0
    with pytest.raises(ConfigError, match="type = 'adaptve' must be one of 'fixed', 'adaptive'"):
        KLCtrlConfig(type="adaptve")
    with pytest.raises(ConfigError, match="ppo_epochs = 0 must be at least 1"):
        ActorConfig(ppo_epochs=0)


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], False),
        (["algorithm.use_kl_in_reward=True"], True),
        (["actor_rollout_ref.actor.use_kl_loss=True"], True),
    ],
)
def test_a_reference_is_needed_for_a_kl_term_only(overrides, needed):
    assert load_config(overrides).needs_reference is needed


def test_resolved_values_are_plain_once_more_for_other_libraries():
    config = load_config(["+actor_rollout_ref.rollout.engine_kwargs.sglang.cuda_graph_bs=[1,2]"])
    plain = config_to_dict(config)
    assert plain["actor_rollout_ref"]["rollout"]["engine_kwargs"]["sglang"] == {"cuda_graph_bs": [1, 2]}
    assert json.loads(json.dumps(plain)) == plain


def test_only_the_named_ranks_trace_steps():
    def profiled(*overrides):
        trainer = load_config(["trainer.n_gpus_per_node=4", *overrides]).trainer
        return [trainer.profiled_steps(rank) for rank in range(4)]

    steps = "trainer.profile_steps=[3,4]"
    assert profiled() == [(), (), (), ()]
    assert profiled(steps) == [(3, 4), (), (), ()]
    assert profiled(steps, "trainer.profile_ranks=[1,2]") == [(), (3, 4), (3, 4), ()]
    assert profiled(steps, "trainer.profile_ranks=all") == [(3, 4)] * 4
