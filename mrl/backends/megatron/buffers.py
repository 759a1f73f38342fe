"""A role's parameters in few flat buffers that are exported once and never move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mrl.backends.megatron.model import ModelChunk
from mrl.reshard.layout import SourceRank
from mrl.reshard.transport import device_number, export_source

_ALIGNMENT_BYTES = 256


@torch.no_grad()
def flatten_parameters(chunk: ModelChunk) -> Tensor:
    """Move a chunk's parameters into one flat buffer, which is returned; their values stay.

    Must run before the optimizer takes views of the parameters. The distributed optimizer's DDP has its own such
    buffer; where it is used this function is not needed.
    """
    parameters = list(chunk.bare.parameters())
    dtypes = {parameter.dtype for parameter in parameters}
    assert len(dtypes) == 1, f"parameters of one role have dtypes {dtypes}"
    step = _ALIGNMENT_BYTES // parameters[0].element_size()
    offsets, total = [], 0
    for parameter in parameters:
        offsets.append(total)
        total += -(-parameter.numel() // step) * step
    flat = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, offset in zip(parameters, offsets, strict=True):
        view = flat[offset : offset + parameter.numel()].view_as(parameter)
        view.copy_(parameter)
        parameter.data = view
    return flat


class ExportedWeights:
    """The export of one role's parameters on this rank, made on first use."""

    def __init__(self, chunks: Sequence[ModelChunk], groups: ProcessGroupCollection) -> None:
        self._chunks = chunks
        self._groups = groups
        self._source: SourceRank | None = None
        self._addresses: dict[str, int] = {}

    def source(self, host: str) -> SourceRank:
        """Where this rank's parameters lie, for engines that pull them; the same on every call.

        `host` is the address of this rank's host. The first call moves CPU storages into shared memory; CUDA memory
        stays. Called when no other process is computing with them.
        """
        named = [item for chunk in self._chunks for item in chunk.named_parameters()]
        if self._source is None:
            self._source = export_source(
                ((name, parameter.detach()) for name, parameter in named),
                rank=torch.distributed.get_rank(),
                tp_rank=self._groups.tp.rank(),
                tp_size=self._groups.tp.size(),
                etp_rank=self._groups.expt_tp.rank(),
                etp_size=self._groups.expt_tp.size(),
                host=host,
                device=device_number(named[0][1].device),
            )
            self._addresses = {name: parameter.data_ptr() for name, parameter in named}
        moved = [name for name, parameter in named if parameter.data_ptr() != self._addresses[name]]
        assert not moved, f"exported parameters were moved, engines would read stale memory: {moved[:3]}"
        return self._source
