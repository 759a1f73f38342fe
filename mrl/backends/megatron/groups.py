"""Process groups of one role."""

from __future__ import annotations

import math

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mrl.parallel.layout import ParallelLayout


def build_groups(layout: ParallelLayout, *, seed: int, timeout_s: float) -> ProcessGroupCollection:
    """The role's groups, and its random states seeded. Called by all ranks, inside the role's state.

    Ranks count tp fastest, then cp, dp, pp, as in `ParallelLayout.coordinates`; for experts etp fastest, then ep.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        # Megatron wants gloo twins of NCCL groups for one legacy checkpoint format only.
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(
        seed,
        tp_rank=groups.tp.rank(),
        ep_rank=groups.ep.rank(),
        etp_rank=groups.expt_tp.rank(),
        force_reset_rng=True,
    )
    return groups


def destroy_groups() -> None:
    """Destroy every group of the role whose state is active, on this rank."""
    created = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in created:
        # None stands for the default group, which is the caller's.
        if group is not None:
            dist.destroy_process_group(group)
