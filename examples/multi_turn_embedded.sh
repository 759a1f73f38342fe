#!/bin/sh
# PPO on conversations: an answer to the embedded counting task that is wrong gets the question again, and a second try
# counts 0.9. On 4 CPU ranks; examples/environments/retry.py answers the model and scores what it has said.
#
#     sh examples/multi_turn_embedded.sh [key=value ...]
set -eu
environment="$(cd "$(dirname "$0")" && pwd)/environments/retry.py"
exec "${PYTHON:-python}" -m mrl.trainer.main_ppo --config-name=demo \
    actor_rollout_ref.rollout.multi_turn.enable=True \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=2 \
    actor_rollout_ref.rollout.multi_turn.max_turn_length=8 \
    actor_rollout_ref.rollout.multi_turn.environment.path="$environment" \
    reward.custom_reward_function.path="$environment" \
    data.max_response_length=20 \
    trainer.n_gpus_per_node=4 \
    trainer.experiment_name=multi_turn_embedded \
    trainer.default_local_dir=runs/multi_turn_embedded \
    "$@"
