"""Checks of micro-batch sizes, those that need the number of data-parallel ranks among them."""

from __future__ import annotations

import logging

from mrl.config.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_micro_batch_size(per_gpu: int | None, global_: int | None, dp_size: int, *, key: str) -> int:
    """Samples per pass on one data-parallel rank, from the current key or its deprecated global twin.

    Args:
        per_gpu: value of the current key, counted per data-parallel rank.
        global_: value of the deprecated key, counted over all of them; a warning is logged when it is used.
        dp_size: data-parallel ranks of the role.
        key: path of the current key, for messages.

    Raises:
        ConfigError: none or both are set, or dp_size does not divide `global_`.
    """
    deprecated = key.removesuffix("_per_gpu")
    if per_gpu is not None and global_ is not None:
        raise ConfigError(f"{key} = {per_gpu} and {deprecated} = {global_} are both set; drop {deprecated}")
    if per_gpu is not None:
        return per_gpu
    if global_ is None:
        raise ConfigError(
            f"{key} is null; set it to the samples that fit one forward-backward pass, for example {key}=1"
        )
    if global_ % dp_size:
        raise ConfigError(
            f"{deprecated} = {global_} is not divisible by the {dp_size} data-parallel ranks; set {key} instead"
        )
    logger.warning(
        "%s=%d is deprecated: divided by %d data-parallel ranks it is %s=%d; set that",
        deprecated,
        global_,
        dp_size,
        key,
        global_ // dp_size,
    )
    return global_ // dp_size


def check_mini_batch(*, path: str, mini_batch_samples: int, micro_batch_size: int, dp_size: int) -> int:
    """Number of micro-batches that each data-parallel rank runs per optimizer step.

    Raises:
        ConfigError: a mini-batch of `mini_batch_samples` does not split evenly.
    """
    num_microbatches, rest = divmod(mini_batch_samples, dp_size * micro_batch_size)
    if rest:
        raise ConfigError(
            f"{path}: a mini-batch of {mini_batch_samples} samples (ppo_mini_batch_size x rollout.n) does not split "
            f"into {dp_size} data-parallel ranks x micro-batches of {micro_batch_size}; change one of the three"
        )
    return num_microbatches


def check_token_limit(key: str, tokens: int, *, longest: int, cp: int) -> None:
    """Raise ConfigError if a sample of `longest` tokens, shared by `cp` GPUs, exceeds a GPU's limit `tokens`."""
    if longest > tokens * cp:
        shared = f" on each of {cp} context-parallel GPUs" if cp > 1 else ""
        raise ConfigError(
            f"{key} = {tokens}{shared} is less than the longest sample, data.max_prompt_length + "
            f"data.max_response_length = {longest}, which cannot be split; raise it to {-(-longest // cp)} or more"
        )
