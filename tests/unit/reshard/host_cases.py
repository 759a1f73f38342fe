"""Trainer ranks and engines spread over simulated hosts."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import assume
from hypothesis import strategies as st
from reshard_cases import engine_params, export, layouts, moe_specs, poisoned, specs

from mrl.reshard.layout import targets_of
from mrl.reshard.plan import build_plan
from mrl.reshard.routes import EnginePlaces
from mrl.reshard.synthetic import distinct_state


@dataclass(kw_only=True)
class HostedJob:
    """A whole job without processes: sources on hosts, engine ranks on hosts, and a plan of each."""

    spec: object
    state: dict
    trainer: object
    sources: list
    hosts: tuple[str, ...]
    tp_size: int
    ep_size: int = 1
    devices: tuple[int, ...] | None = None
    """Of the engine ranks; None: CPU."""

    def params(self, rank):
        """What engine rank `rank` should hold."""
        return engine_params(
            self.spec, self.state, tp_rank=rank % self.tp_size, tp_size=self.tp_size, ep_size=self.ep_size
        )

    def places(self, rank):
        return EnginePlaces(hosts=self.hosts, devices=self.devices, tp_size=self.tp_size, rank=rank)

    def plan(self, rank, params=None, **kwargs):
        places = self.places(rank)
        return build_plan(
            self.spec,
            self.sources,
            targets_of(poisoned(params or self.params(rank)).items()),
            tp_rank=places.tp_rank,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            host=places.host,
            places=places,
            **{"device": -1 if places.device is None else places.device, **kwargs},
        )

    def plans(self, **kwargs):
        return [self.plan(rank, **kwargs) for rank in range(len(self.hosts))]

    def memory(self, source_rank):
        """The exported buffer of a trainer rank. [num_bytes] uint8"""
        tensor = next(iter(self.trainer.memory[source_rank].values()))
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def host_job(spec, layout, *, ranks_per_host, tp_size, num_engines=None, ep_size=1, ranks_per_device=None):
    """Trainer ranks fill the hosts in order; engines live on the first ranks, as in a training job.

    Memory is on the CPU; with `ranks_per_device`, exports and places say it is on devices.
    """
    state = distinct_state(spec, torch.float32)
    for tensor in state.values():
        # No weight's bits are zero, as those of padding are.
        tensor.view(torch.int32).add_(1)
    trainer = export(spec, state, layout)
    names = [f"host{rank // ranks_per_host}" for rank in range(layout.world_size)]
    on = [-1 if ranks_per_device is None else rank // ranks_per_device for rank in range(layout.world_size)]
    sources = [replace(source, host=names[source.rank], device=on[source.rank]) for source in trainer.sources]
    engine_ranks = tp_size * (layout.world_size // tp_size if num_engines is None else num_engines)
    return HostedJob(
        spec=spec,
        state=state,
        trainer=trainer,
        sources=sources,
        hosts=tuple(names[:engine_ranks]),
        tp_size=tp_size,
        ep_size=ep_size,
        devices=None if ranks_per_device is None else tuple(on[:engine_ranks]),
    )


@st.composite
def host_jobs(draw, ranks_per_device=None):
    """Builders of jobs in which every trainer rank has an engine rank beside it, with any number of ranks to a host.

    Not the jobs: hypothesis complains about the time that drawing takes on a loaded machine.
    """
    spec, layout = draw(st.one_of(specs, moe_specs)), draw(layouts())
    assume(spec.num_hidden_layers % (layout.pp * (layout.vpp or 1)) == 0)
    if spec.moe:
        on_stage = layout.world_size // layout.pp
        ep = draw(st.sampled_from([size for size in (1, 2) if on_stage % size == 0]))
        layout = replace(
            layout, ep=ep, etp=draw(st.sampled_from([size for size in (1, 2) if on_stage // ep % size == 0]))
        )
    sizes = [size for size in (1, 2, 4) if layout.world_size % size == 0]
    return partial(
        host_job,
        spec,
        layout,
        ranks_per_host=draw(st.integers(1, layout.world_size)),
        tp_size=draw(st.sampled_from(sizes)),
        ranks_per_device=None if ranks_per_device is None else draw(ranks_per_device),
    )
