#!/bin/sh
# GRPO on the embedded counting task with an actor of 16 experts, on 4 CPU ranks: TP2 x DP2, the experts dealt out over
# two ranks (EP2), each token sent to the experts to which the rollout engine sent it (router replay).
#
#     sh examples/moe_embedded.sh [key=value ...]
set -eu
exec "${PYTHON:-python}" -m mrl.trainer.main_ppo --config-name=demo \
    actor_rollout_ref.model.path=embedded:moe_actor \
    actor_rollout_ref.actor.megatron.router_replay.mode=R3 \
    actor_rollout_ref.actor.megatron.expert_model_parallel_size=2 \
    actor_rollout_ref.actor.megatron.sequence_parallel=True \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    actor_rollout_ref.rollout.n=8 \
    data.train_batch_size=16 \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    trainer.n_gpus_per_node=4 \
    trainer.experiment_name=moe_embedded \
    trainer.default_local_dir=runs/moe_embedded \
    "$@"
