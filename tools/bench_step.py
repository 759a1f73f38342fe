"""A whole PPO step of the real trainer: seconds per phase, and rollout against SGLang's own offline generation.

    python tools/bench_step.py --output docs/benchmarks/step_h100x1.json
    python tools/bench_step.py --gpus 2 --output docs/benchmarks/step_h100x2_tp2.json \\
        actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2
    python tools/bench_step.py --demo --output docs/benchmarks/step_cpu2.json

Actor, critic and reference are 1.5B-shaped Qwen2 models of random weights; prompts and responses have equal lengths.
`key=value` arguments are the trainer's own and win over those made here. Medians leave out the first step, in which
kernels are compiled and host memory is allocated. With --demo the job is that of `make demo`, on CPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench_model import QWEN2_1_5B, TINY, write_model, write_tokenizer
from benchmark_file import installed, write
from step_rows import phase_rows, rollout_rows

from mrl.config.load import load_config
from mrl.config.schema import PPOConfig
from mrl.data.rows import write_rows
from mrl.launch import run
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import RankFailure, run_ranks
from mrl.observability.console import setup_logging
from mrl.observability.report import read_metrics
from mrl.trainer.inputs import load_inputs
from mrl.trainer.plan import plan_run

_PACKAGES = ("torch", "sglang", "megatron-core", "transformer-engine")
_REWARD = '''def compute_score(data_source, solution_str, ground_truth, extra_info):
    """Share of a few letters: a number that differs between responses and costs nothing."""
    return solution_str.count("1") / (len(solution_str) + 1)
'''


def model_job(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Make model, prompts and reward; returns the overrides of a job on GPUs (or, tiny, on CPU ranks)."""
    shape = TINY if arguments.tiny else QWEN2_1_5B
    model, prompts, reward = folder / "model", folder / "prompts.parquet", folder / "reward.py"
    write_model(model, shape, max_length=2 * arguments.length)
    write_tokenizer(model, shape.vocab_size)
    _write_prompts(prompts, count=arguments.prompts * arguments.steps, length=arguments.length)
    reward.write_text(_REWARD)
    actor, rollout, critic = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "critic"
    overrides = [
        f"data.train_files={prompts}",
        f"data.train_batch_size={arguments.prompts}",
        f"data.max_prompt_length={arguments.length}",
        f"data.max_response_length={arguments.length}",
        f"reward.custom_reward_function.path={reward}",
        f"actor_rollout_ref.model.path={model}",
        f"critic.model.path={model}",
        f"{actor}.ppo_mini_batch_size={max(1, arguments.prompts // 4)}",
        f"{actor}.use_dynamic_bsz=True",
        f"{actor}.ppo_max_token_len_per_gpu={arguments.micro_tokens}",
        f"{critic}.ppo_max_token_len_per_gpu={arguments.micro_tokens}",
        # A pass without gradients keeps little; small ones would wait for their kernels to be launched.
        f"{rollout}.log_prob_max_token_len_per_gpu={4 * arguments.micro_tokens}",
        f"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu={4 * arguments.micro_tokens}",
        f"{critic}.forward_max_token_len_per_gpu={4 * arguments.micro_tokens}",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.ignore_eos=True",
        f"{rollout}.max_num_seqs={arguments.prompts}",
        "algorithm.use_kl_in_reward=True",
        f"trainer.n_gpus_per_node={arguments.gpus}",
    ]
    if arguments.tiny:
        roles = (f"{actor}.megatron", f"{critic}.megatron", "actor_rollout_ref.ref.megatron", rollout)
        return [*overrides, "trainer.device=cpu", *(f"{role}.dtype=float32" for role in roles)]
    return [
        *overrides,
        "trainer.device=cuda",
        f"{rollout}.gpu_memory_utilization=0.4",
        # Kernels that need no compiler at start; no graphs of prefills, whose capture takes longer than they save.
        f"{rollout}.engine_kwargs.sglang.attention_backend=triton",
        f"{rollout}.engine_kwargs.sglang.disable_prefill_cuda_graph=True",
        f"{actor}.megatron.optimizer_offload=True",
        f"{actor}.megatron.grad_offload=True",
        f"{critic}.megatron.param_offload=True",
        f"{critic}.megatron.optimizer_offload=True",
        "actor_rollout_ref.ref.megatron.param_offload=True",
    ]


def _write_prompts(path: Path, *, count: int, length: int) -> None:
    digits = random.Random(0)
    rows = [
        {
            "data_source": "digits",
            "prompt": "".join(digits.choices("0123456789", k=length)),
            "reward_model": {"style": "rule", "ground_truth": ""},
        }
        for _ in range(count)
    ]
    write_rows(path, rows)


def train(config: PPOConfig, *, compare: bool) -> list[float]:
    """Run the job; tokens/s of the engine's own `generate` on the last step's prompts where that is wanted.

    The ranks are those of the local launcher, forked here.
    """
    run.prepare_process()
    plan = plan_run(config)
    inputs = load_inputs(config, plan)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    run.announce(config, plan)
    if plan.device == "cpu":
        run.preload()

    def rank_main(env: RankEnvironment) -> list[float]:
        run.preload()
        # Imported in the rank: they bring Megatron and SGLang, and with them CUDA.
        from step_rollout import generate_alone

        from mrl.trainer.build import build_trainer

        setup_logging(rank=env.rank)
        with build_trainer(config, plan, inputs, env) as trainer:
            trainer.fit()
            return generate_alone(trainer) if compare else []

    return [speed for speeds in run_ranks(rank_main, config.trainer.world_size, timeout_s=900) for speed in speeds]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job, read its metrics file and write the rows."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    setup_logging(rank=0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        steps, alone = _run(arguments, Path(folder))
    if len(steps) < 2:
        parser.exit(1, f"{len(steps)} steps were made; the first does not count\n")
    case = "the embedded task" if arguments.demo else _case(arguments)
    rows = [*phase_rows(case, steps[1:]), *rollout_rows(case, steps[1:], alone)]
    print(*rows, sep="\n")
    if arguments.output:
        write(arguments.output, "step", rows, installed(_PACKAGES))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--demo", action="store_true", help="the job of `make demo`")
    parser.add_argument("--tiny", action="store_true", help="the GPU's job with a tiny model, on CPU")
    parser.add_argument("--gpus", type=int, default=1, help="ranks")
    parser.add_argument("--prompts", type=int, default=512, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each prompt, and of each response")
    parser.add_argument("--micro-tokens", type=int, default=8192, help="most tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where model and outputs lie for the run; /dev/shm saves seconds")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def _run(arguments: argparse.Namespace, folder: Path) -> tuple[list[dict[str, float]], float]:
    """Metrics of every step, and tokens/s of the engines' own generation; of a job that was cut off, what it made."""
    run_dir = folder / "run"
    own = [] if arguments.demo else model_job(folder, arguments)
    overrides = [
        *own,
        f"trainer.default_local_dir={run_dir}",
        f"trainer.total_training_steps={arguments.steps}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.logger=[console,file]",
        *arguments.overrides,
    ]
    config = load_config(overrides, "demo" if arguments.demo else "ppo_megatron_trainer")
    alone: list[float] = []
    try:
        alone = train(config, compare=not arguments.demo)
    except (RankFailure, TimeoutError, KeyboardInterrupt):
        traceback.print_exc()
    if not (run_dir / "metrics.jsonl").is_file():
        return [], 0.0
    return [row for row in read_metrics(run_dir) if "time/step_s" in row], sum(alone)


def _case(arguments: argparse.Namespace) -> str:
    return f"{arguments.prompts} prompts x {arguments.length} + {arguments.length} tokens, {arguments.gpus} ranks"


if __name__ == "__main__":
    main()
