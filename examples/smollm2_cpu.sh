#!/bin/sh
# PPO on a real pretrained model, SmolLM2-135M-Instruct, without a hub and without a GPU: two small steps on procedural
# arithmetic (about 25 s each on 2 cores). Both models and the rows come from Python packages.
#
#     sh examples/smollm2_cpu.sh [FOLDER] [key=value ...]
#
# On a GPU: examples/smollm2_gpu.sh.
set -eu
python=${PYTHON:-python}
folder=${1:-runs/smollm2}
[ $# -eq 0 ] || shift

sh examples/smollm2_model.sh "$folder"
[ -f "$folder/data/train.parquet" ] || "$python" examples/data_preprocess/reasoning_gym.py \
    --tasks chain_sum --train_size 2000 --test_size 50 --local_save_dir "$folder/data"

exec "$python" -m mrl.trainer.main_ppo \
    data.train_files="$folder/data/train.parquet" \
    data.val_files="$folder/data/test.parquet" \
    data.val_max_samples=8 \
    data.train_batch_size=4 \
    data.max_prompt_length=128 \
    data.max_response_length=64 \
    actor_rollout_ref.model.path="$folder/model" \
    critic.model.path="$folder/model" \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 \
    actor_rollout_ref.actor.megatron.dtype=float32 \
    critic.ppo_micro_batch_size_per_gpu=1 \
    critic.megatron.dtype=float32 \
    actor_rollout_ref.rollout.dtype=float32 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.num_engines=1 \
    actor_rollout_ref.rollout.max_num_seqs=16 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2 \
    trainer.device=cpu \
    trainer.n_gpus_per_node=2 \
    trainer.total_training_steps=2 \
    trainer.default_local_dir="$folder/run" \
    "$@"
