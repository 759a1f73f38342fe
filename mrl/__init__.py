"""PPO with 3D-parallel Megatron-core training and colocated SGLang rollouts."""

__version__ = "0.1.0"
