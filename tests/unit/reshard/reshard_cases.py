"""Small models and layouts for the reshard tests, and one way to run a whole layout pair without an engine."""

import torch
from hypothesis import strategies as st
from model_specs import make_spec

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.layout import targets_of
from mrl.reshard.plan import build_plan
from mrl.reshard.reference import sglang_shard
from mrl.reshard.spec import MixtureOfExperts
from mrl.reshard.synthetic import distinct_state, export_layout

specs = st.builds(
    make_spec,
    vocab_size=st.integers(9, 70),
    hidden_size=st.sampled_from([4, 6]),
    num_key_value_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([2, 4]),
    tie_word_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    qk_layernorm=st.booleans(),
)


moe_specs = st.builds(
    make_spec,
    family=st.sampled_from(["qwen3_moe", "mixtral"]),
    vocab_size=st.integers(9, 30),
    num_key_value_heads=st.sampled_from([2, 8]),
    num_hidden_layers=st.just(2),
    attention_bias=st.just(False),
    qk_layernorm=st.booleans(),
    moe=st.builds(
        MixtureOfExperts,
        num_experts=st.sampled_from([4, 8]),
        num_experts_per_tok=st.just(2),
        norm_topk_prob=st.just(True),
    ),
)


@st.composite
def layouts(draw):
    tp, pp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    vpp = draw(st.sampled_from([None, 2])) if pp == 2 else None
    return ParallelLayout(world_size=tp * pp * dp, tp=tp, pp=pp, vpp=vpp)


def padded(vocab_size, multiple):
    return -(-vocab_size // multiple) * multiple


def export(spec, state, layout, *, vocab_multiple=1, first_device=-1, host="host"):
    rows = padded(spec.vocab_size, vocab_multiple * layout.tp)
    return export_layout(spec, state, layout, padded_vocab_size=rows, host=host, first_device=first_device)


def engine_params(spec, state, *, tp_rank, tp_size, ep_size=1, vocab_multiple=8):
    """What the engine rank should hold, by the slow reference."""
    rows = padded(spec.vocab_size, vocab_multiple * tp_size)
    return sglang_shard(state, spec, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size, padded_vocab_size=rows)


def poisoned(params):
    return {
        name: torch.full_like(param, torch.nan, memory_format=torch.contiguous_format) for name, param in params.items()
    }


def plan_for(spec, sources, params, *, tp_rank=0, tp_size=1, ep_size=1, host="host", device=-1):
    targets = targets_of(params.items())
    place = {"tp_rank": tp_rank, "tp_size": tp_size, "ep_size": ep_size, "host": host, "device": device}
    return build_plan(spec, sources, targets, **place)


def pull_rank(spec, trainer, expected, *, tp_rank, tp_size, ep_size=1):
    """Poisoned parameters of one engine rank after a pull."""
    params = poisoned(expected)
    plan = plan_for(spec, trainer.sources, params, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size)
    Puller(plan, open_sources(plan, trainer.sources), params).pull()
    return params


def bitwise_equal(left, right):
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def state_and_trainer(spec, layout, dtype=torch.float32, **kwargs):
    state = distinct_state(spec, dtype)
    return state, export(spec, state, layout, **kwargs)
