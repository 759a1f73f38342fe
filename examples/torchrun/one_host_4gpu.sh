#!/bin/sh
# One host, 4 GPUs, under torchrun, which starts one process per GPU. (Without torchrun the same command starts the ranks
# itself: python -m mrl.trainer.main_ppo with the same keys.)
#
#     MODEL=... DATA=... sh examples/torchrun/one_host_4gpu.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. examples/jobs/qwen2_7b_4gpu.sh
exec torchrun --standalone --nproc-per-node=4 -m mrl.trainer.main_ppo "$@"
