#!/bin/sh
# Two hosts, 16 GPUs, under torchrun. Start it on both hosts, with the first one's address:
#
#     HOST0=10.0.0.1 MODEL=... DATA=... RUN=/shared/... sh examples/torchrun/two_hosts_16gpu.sh [key=value ...]
#
# TASKS=1 starts one process per host, which forks its 8 ranks, instead of one per GPU.
set -eu
cd "$(dirname "$0")/../.."
. examples/jobs/llama31_8b_16gpu.sh
exec torchrun --nnodes=2 --nproc-per-node="${TASKS:-8}" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$HOST0:${PORT:-29500}" --rdzv-id="${RDZV_ID:-mrl}" \
    -m mrl.trainer.main_ppo "$@"
