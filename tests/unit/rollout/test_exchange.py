"""Generations and their experts on all ranks, of one host and of two."""

import gc
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from model_specs import make_spec

from mrl.interfaces import EngineError
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.reshard.spec import MixtureOfExperts
from mrl.rollout.exchange import GenerationExchange
from mrl.types import Generation, Prompt

LAYERS, K = 3, 2
PROMPTS = {
    index: Prompt(uid=str(index), token_ids=[1] * (index + 1), messages=[], data_source="x") for index in (7, 2, 5)
}
LEADER_OF = {7: 1, 2: 2, 5: 2}


def make_moe_spec(num_experts=8):
    experts = MixtureOfExperts(num_experts=num_experts, num_experts_per_tok=K, norm_topk_prob=True)
    return make_spec(family="qwen3_moe", num_hidden_layers=LAYERS, moe=experts)


def experts_of(index, rows):
    """Two different ones for every token and layer, other ones in every sample."""
    first = (torch.arange(rows * LAYERS) * (index + 1)) % 7
    return torch.stack([first, first + 1], dim=1).view(rows, -1).to(torch.int16)


def generation(index, *, experts=True):
    response = list(range(index, index + 4))
    rows = len(PROMPTS[index].token_ids) + len(response) - 1
    return Generation(
        response_ids=response,
        rollout_log_probs=[-0.5 * token for token in response],
        finish_reason="stop",
        weight_version=3,
        routed_experts=experts_of(index, rows) if experts else None,
    )


def on_four_ranks(scenario):
    """What `scenario(rank)` returns on each of four ranks; the second and the third lead engines."""

    def main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
        try:
            return scenario(env.rank)
        finally:
            dist.destroy_process_group()

    return run_ranks(main, 4, timeout_s=60)


def generations_of(rank, **options):
    return {index: generation(index, **options) for index, leader in LEADER_OF.items() if leader == rank}


@pytest.mark.parametrize("hosts", ["aaaa", "aabb", "abcd"])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_every_rank_gets_all_generations_with_their_experts(hosts, num_experts):
    def scenario(rank):
        exchange = GenerationExchange(hosts, make_moe_spec(num_experts), rank=rank)
        found = exchange.gather(generations_of(rank), PROMPTS, with_experts=True)
        assert found.keys() == PROMPTS.keys()
        for index, each in found.items():
            expected = generation(index)
            assert list(each.response_ids) == expected.response_ids
            assert torch.equal(each.routed_experts.to(torch.int16), expected.routed_experts)
            assert each.routed_experts.dtype == (torch.uint8 if num_experts == 8 else torch.int16)
        without = exchange.gather(generations_of(rank), PROMPTS)
        assert all(each.routed_experts is None for each in without.values())
        assert exchange.gather({}, {}, with_experts=True) == {}

    on_four_ranks(scenario)


def test_a_host_has_the_experts_once_and_nothing_stays():
    def scenario(rank):
        exchange = GenerationExchange("aabb", make_moe_spec(), rank=rank)
        # What the tests before this one have left to the collector has files, too.
        gc.collect()
        open_files = len(os.listdir("/proc/self/fd"))
        found = exchange.gather(generations_of(rank), PROMPTS, with_experts=True)
        dist.barrier()
        if rank == 0:
            found[2].routed_experts[0, 0] = 99
        dist.barrier()
        seen = int(found[2].routed_experts[0, 0])
        dist.barrier()
        del found
        gc.collect()
        return seen, len(os.listdir("/proc/self/fd")) - open_files

    assert on_four_ranks(scenario) == [(99, 0), (99, 0), (0, 0), (0, 0)]


def test_experts_that_cannot_be_are_refused_on_every_rank():
    def scenario(rank):
        exchange = GenerationExchange("aaaa", make_moe_spec(), rank=rank)
        mine = generations_of(rank)
        garbage, zeros = generations_of(rank), generations_of(rank)
        if rank == 2:
            mine[5].routed_experts = mine[5].routed_experts[:-1]
            garbage[5].routed_experts[2, 3] = 8
            zeros[2].routed_experts[1, 2:4] = 0
        messages = []
        for broken in (mine, generations_of(rank, experts=rank != 1), garbage, zeros):
            try:
                exchange.gather(broken, PROMPTS, with_experts=True)
            except EngineError as error:
                messages.append(str(error))
        return messages

    for cut, missing, garbage, zeros in on_four_ranks(scenario):
        assert "engine of rank 2 reported experts of shape (8, 6) for a sample that needs (9, 6)" in cut
        assert "engine of rank 1 reported experts of shape None" in missing
        assert "engine of rank 2 reported experts 0 to 8 of a model with 8" in garbage
        assert "engine of rank 2 reported an expert twice for the same token and layer" in zeros


def test_a_dense_model_has_no_experts_to_exchange():
    exchange = GenerationExchange(["a"], make_spec(family="llama"), rank=0)
    assert list(exchange.gather({7: generation(7, experts=False)}, PROMPTS)) == [7]
    with pytest.raises(ValueError, match="of a model that has none"):
        exchange.gather({7: generation(7)}, PROMPTS, with_experts=True)
