"""PPO with 3D-parallel Megatron-core training and colocated SGLang rollouts."""

import os

# Importing transformers asks torch whether there is CUDA. The ordinary answer starts the driver, after which ranks that
# are forked from this process could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

__version__ = "0.1.0"
