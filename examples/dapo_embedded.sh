#!/bin/sh
# DAPO on the embedded counting task, on 2 CPU ranks: GRPO's advantages with a higher upper clip, the loss averaged over
# tokens, no KL term, prompts without a spread replaced by others, and a penalty on responses near the length limit.
#
#     sh examples/dapo_embedded.sh [key=value ...]
set -eu
exec "${PYTHON:-python}" -m mrl.trainer.main_ppo --config-name=demo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=acc \
    algorithm.filter_groups.max_num_gen_batches=20 \
    data.train_batch_size=16 \
    data.gen_batch_size=24 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    reward.reward_kwargs.overlong_buffer_cfg.enable=True \
    reward.reward_kwargs.overlong_buffer_cfg.len=2 \
    reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.2 \
    reward.reward_kwargs.overlong_buffer_cfg.log=True \
    trainer.n_gpus_per_node=2 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    trainer.experiment_name=dapo_embedded \
    trainer.default_local_dir=runs/dapo_embedded \
    "$@"
