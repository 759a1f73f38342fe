#!/bin/sh
# PPO on a real pretrained model on one GPU: SmolLM2-135M-Instruct learns to count letters. Two solved questions stand
# before each one; without them the model never writes an answer that could be scored. Model and rows come from Python
# packages. docs/benchmarks/smollm2_h200x1.json has the curves of the first 35 steps: 0.17 -> 0.34, validation 0.26 ->
# 0.32 (a learning rate of 1e-5 is there after 12 steps, and no further after 60).
#
#     sh examples/smollm2_gpu.sh [FOLDER] [key=value ...]
set -eu
python=${PYTHON:-python}
folder=${1:-runs/smollm2}
[ $# -eq 0 ] || shift

sh examples/smollm2_model.sh "$folder"
[ -f "$folder/counting/train.parquet" ] || "$python" examples/data_preprocess/reasoning_gym.py \
    --tasks letter_counting --train_size 8000 --test_size 300 --num_shots 2 \
    --instruction "Give only the final answer between <answer> and </answer>." --local_save_dir "$folder/counting"

exec "$python" -m mrl.trainer.main_ppo \
    data.train_files="$folder/counting/train.parquet" \
    data.val_files="$folder/counting/test.parquet" \
    data.train_batch_size=256 \
    data.max_prompt_length=320 \
    data.max_response_length=32 \
    actor_rollout_ref.model.path="$folder/model" \
    critic.model.path="$folder/model" \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768 \
    actor_rollout_ref.actor.optim.lr=3e-6 \
    actor_rollout_ref.actor.megatron.optimizer_offload=True \
    critic.use_dynamic_bsz=True \
    critic.ppo_max_token_len_per_gpu=32768 \
    critic.optim.lr=5e-5 \
    critic.megatron.optimizer_offload=True \
    critic.megatron.param_offload=True \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    trainer.device=cuda \
    trainer.n_gpus_per_node=1 \
    trainer.critic_warmup=2 \
    trainer.total_training_steps=70 \
    trainer.test_freq=35 \
    trainer.default_local_dir="$folder/run" \
    "$@"
