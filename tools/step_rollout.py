"""SGLang's own offline generation on the engines of a trainer, for comparison with its rollout phase."""

from __future__ import annotations

import time
import traceback
from typing import Any

import torch.distributed as dist

from mrl.backends.sglang.engine import SGLangEngine
from mrl.backends.sglang.requests import sampling_dict
from mrl.trainer.ppo import PPOTrainer


def generate_alone(trainer: PPOTrainer) -> list[float]:
    """Tokens/s of `Engine.generate` on this rank's engine, with log-probs, on its share of the prompts of a step.

    Called by all ranks after training, when engines have their memory and weights; empty on ranks without an engine,
    and where it fails, which is printed.
    """
    collector = trainer.collector
    prompts = [prompt for prompt in next(collector.prompts) for _ in range(collector.n_samples_per_prompt)]
    engine, leaders = collector.rollout._engine, collector.rollout._leaders
    speeds = []
    dist.barrier()
    try:
        if isinstance(engine, SGLangEngine):
            share = [prompt.token_ids for prompt in prompts][leaders.index(dist.get_rank()) :: len(leaders)]
            speeds = [_generate(engine, share, sampling_dict(collector.sampling))]
    except Exception:
        print(traceback.format_exc(), flush=True)
    dist.barrier()
    return speeds


def _generate(engine: SGLangEngine, prompts: list[list[int]], sampling: dict[str, Any]) -> float:
    # No cached prefix, as after an update of the weights.
    engine._flush()
    start = time.perf_counter()
    answers = engine._supervisor._alive().engine.generate(
        input_ids=prompts, sampling_params=sampling, return_logprob=True
    )
    return sum(len(answer["output_ids"]) for answer in answers) / (time.perf_counter() - start)
