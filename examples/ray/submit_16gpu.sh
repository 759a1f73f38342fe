#!/bin/sh
# The two-host job, submitted to a Ray cluster from outside, for example from a laptop with a tunnel to its dashboard
# (ssh -L 8265:127.0.0.1:8265 HEAD); that takes ray[default] on both sides. MODEL, DATA and RUN are folders on the
# cluster; RUN is shared by its hosts.
#
#     MODEL=... DATA=... RUN=/shared/... sh examples/ray/submit_16gpu.sh [key=value ...]
#
# Further environment variables of all hosts: ray_kwargs.ray_init.runtime_env.env_vars.NAME=VALUE.
set -eu
cd "$(dirname "$0")/../.."
. examples/jobs/llama31_8b_16gpu.sh
exec ray job submit --address="${DASHBOARD:-http://127.0.0.1:8265}" -- python -m mrl.trainer.main_ppo "$@"
