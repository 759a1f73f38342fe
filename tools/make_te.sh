#!/bin/sh
# Put transformer-engine into the environment in folder $1. Its PyTorch part has no wheel: it is compiled here, against
# that environment's torch, with a CUDA toolkit of torch's major version; 5 to 20 minutes.
set -eu
venv=$1
python=$venv/bin/python
[ -x "$python" ] || { echo "mrl: there is no environment in $venv; make env builds it" >&2; exit 1; }

facts=$("$python" - <<'PYTHON'
from importlib.metadata import requires
import sysconfig, torch
from packaging.requirements import Requirement
wanted = next(each for each in map(Requirement, requires("mrl")) if each.name == "transformer-engine")
print(str(wanted.specifier), torch.version.cuda.split(".")[0], sysconfig.get_paths()["purelib"])
PYTHON
)
# shellcheck disable=SC2086
set -- $facts
version=$1 cuda=$2 site=$3

CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")}
export CUDA_HOME
found=$("$CUDA_HOME/bin/nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p') || true
if [ "$found" != "$cuda" ]; then
    echo "mrl: transformer-engine needs nvcc of CUDA $cuda, like torch; $CUDA_HOME has ${found:-none}. Install the toolkit" \
        "and set CUDA_HOME" >&2
    exit 1
fi

# Headers that pip installs beside torch, in place of a system's.
CPATH=$site/nvidia/cu$cuda/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include:$site/nvidia/cu$cuda/include/nvtx3
export CPATH NVTE_FRAMEWORK=pytorch
export MAX_JOBS="${MAX_JOBS:-4}" NVTE_BUILD_THREADS_PER_JOB="${NVTE_BUILD_THREADS_PER_JOB:-1}"
# Without a GPU to look at, for Hopper.
[ -e /dev/nvidiactl ] || export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" NVTE_CUDA_ARCHS="${NVTE_CUDA_ARCHS:-90}"

export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
install() { "$venv/bin/uv" pip install --quiet --python "$python" "$@"; }
echo "mrl: building transformer-engine$version against $("$python" -c 'import torch; print("torch", torch.__version__)')"
install wheel setuptools pybind11 ninja
install --no-deps "transformer-engine$version" "transformer-engine-cu$cuda$version"
# In an environment of its own the build would take the newest torch.
install --no-deps --no-build-isolation --no-binary transformer-engine-torch "transformer-engine-torch$version"
