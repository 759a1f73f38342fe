#!/bin/sh
# RLOO on the embedded counting task, on 2 CPU ranks: 32 prompts with 4 responses each in a step, KL in the reward, no
# critic.
#
#     sh examples/rloo_embedded.sh [key=value ...]
set -eu
exec "${PYTHON:-python}" -m mrl.trainer.main_ppo --config-name=demo \
    algorithm.adv_estimator=rloo \
    actor_rollout_ref.rollout.n=4 \
    data.train_batch_size=32 \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    trainer.n_gpus_per_node=2 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    trainer.experiment_name=rloo_embedded \
    trainer.default_local_dir=runs/rloo_embedded \
    "$@"
