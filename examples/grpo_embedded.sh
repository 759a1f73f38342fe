#!/bin/sh
# GRPO on the embedded counting task, on 2 CPU ranks: 16 prompts with 8 responses each in a step, KL in the loss, no
# critic. For Dr. GRPO add algorithm.norm_adv_by_std_in_grpo=False and
# actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm.
#
#     sh examples/grpo_embedded.sh [key=value ...]
set -eu
exec "${PYTHON:-python}" -m mrl.trainer.main_ppo --config-name=demo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.rollout.n=8 \
    data.train_batch_size=16 \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    trainer.n_gpus_per_node=2 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    trainer.experiment_name=grpo_embedded \
    trainer.default_local_dir=runs/grpo_embedded \
    "$@"
