"""A job on paper, as far as its weights are concerned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec


@dataclass(kw_only=True, frozen=True)
class Job:
    """Layouts of trainer and engines, and how their ranks lie on hosts."""

    spec: ModelSpec
    layout: ParallelLayout
    rollout_tp: int
    rollout_ep: int
    num_engines: int
    gpus_per_host: int
    dtype: torch.dtype
    alias: bool = False
    """Engine parameters are the trainer's memory where they can be."""
