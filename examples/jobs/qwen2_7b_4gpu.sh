# PPO on Qwen2-7B-Instruct and GSM8K, one host with 4 GPUs: actor, critic and reference at TP4, two engines at TP2.
#
# Read by the scripts for each launcher (. examples/jobs/qwen2_7b_4gpu.sh): sets their arguments.
MODEL=${MODEL:-$HOME/models/Qwen2-7B-Instruct}
DATA=${DATA:-$HOME/data/gsm8k}
RUN=${RUN:-$PWD/runs/qwen2_7b_4gpu}
set -- \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=512 \
    data.max_prompt_length=1024 \
    data.max_response_length=1024 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    actor_rollout_ref.actor.megatron.optimizer_offload=True \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.ref.megatron.param_offload=True \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
    critic.model.path="$MODEL" \
    critic.model.enable_gradient_checkpointing=True \
    critic.optim.lr=1e-5 \
    critic.ppo_micro_batch_size_per_gpu=8 \
    critic.megatron.tensor_model_parallel_size=4 \
    critic.megatron.pipeline_model_parallel_size=1 \
    critic.megatron.param_offload=True \
    critic.megatron.optimizer_offload=True \
    algorithm.use_kl_in_reward=True \
    algorithm.kl_ctrl.kl_coef=0.001 \
    trainer.nnodes=1 \
    trainer.n_gpus_per_node=4 \
    trainer.total_epochs=15 \
    trainer.test_freq=10 \
    trainer.save_freq=20 \
    trainer.default_local_dir="$RUN" \
    "$@"
