#!/bin/sh
# One host, 4 GPUs, on Ray. The cluster that RAY_ADDRESS names, else the one that runs on this host, else one that is
# started for this job and that no other host can reach.
#
#     MODEL=... DATA=... sh examples/ray/one_host_4gpu.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. examples/jobs/qwen2_7b_4gpu.sh
exec python -m mrl.trainer.main_ppo trainer.launcher=ray "$@"
