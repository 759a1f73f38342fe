#!/bin/sh
# GRPO on the embedded counting task, on 2 CPU ranks, with a judge that SGLang serves: the verifier's score plus a tenth
# of what the judge says. The judge here is an untrained model that answers with some digits, of which the last is its
# score; JUDGE_MODEL names a folder with another model, JUDGE_URL an endpoint that runs already.
#
#     sh examples/judge_embedded.sh [key=value ...]
set -eu
PYTHON="${PYTHON:-python}"
RUN=runs/judge_embedded
if [ -z "${JUDGE_URL:-}" ]; then
    PORT="${JUDGE_PORT:-30000}"
    JUDGE_URL="http://127.0.0.1:$PORT/v1"
    mkdir -p "$RUN"
    MODEL="${JUDGE_MODEL:-$("$PYTHON" -m mrl.data.embedded actor "$RUN/embedded")}"
    "$PYTHON" -m mrl.backends.sglang.server "$MODEL" --port "$PORT" >"$RUN/judge.log" 2>&1 &
    JUDGE=$!
    trap 'kill "$JUDGE" 2>/dev/null || true; wait "$JUDGE" 2>/dev/null || true' EXIT INT TERM
    until grep -q "answers at" "$RUN/judge.log"; do
        kill -0 "$JUDGE" 2>/dev/null || { cat "$RUN/judge.log"; exit 1; }
        sleep 1
    done
fi
"$PYTHON" -m mrl.trainer.main_ppo --config-name=demo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    actor_rollout_ref.rollout.n=8 \
    data.train_batch_size=16 \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    reward.functions.correct.weight=1.0 \
    reward.judge.url="$JUDGE_URL" \
    reward.judge.weight=0.1 \
    reward.judge.prompt_template="'{prompt}{response}'" \
    reward.judge.score_regex="'([0-9])'" \
    reward.judge.max_new_tokens=4 \
    reward.judge.max_concurrent=8 \
    trainer.n_gpus_per_node=2 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    trainer.experiment_name=judge_embedded \
    trainer.default_local_dir="$RUN" \
    "$@"
