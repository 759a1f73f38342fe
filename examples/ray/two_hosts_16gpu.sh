#!/bin/sh
# Two hosts, 16 GPUs, on Ray. Start a cluster first (both hosts need mrl and ray in the same Python):
#
#     ray start --head --node-ip-address=10.0.0.1 --port=6379 --disable-usage-stats    # on the first host
#     ray start --address=10.0.0.1:6379 --disable-usage-stats                          # on the second
#
# and then, on either of them:
#
#     MODEL=... DATA=... RUN=/shared/... sh examples/ray/two_hosts_16gpu.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. examples/jobs/llama31_8b_16gpu.sh
export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
exec python -m mrl.trainer.main_ppo trainer.launcher=ray "$@"
