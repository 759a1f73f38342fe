#!/bin/sh
# PPO on the embedded counting task, on 2 CPU ranks: actor and reference TP2, critic DP2, one engine at TP2.
#
#     sh examples/ppo_embedded.sh [key=value ...]
set -eu
exec "${PYTHON:-python}" -m mrl.trainer.main_ppo --config-name=demo \
    trainer.n_gpus_per_node=2 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    critic.megatron.pipeline_model_parallel_size=1 \
    trainer.experiment_name=ppo_embedded \
    trainer.default_local_dir=runs/ppo_embedded \
    "$@"
