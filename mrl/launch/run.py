"""From a configuration to a finished run, whatever starts the ranks."""

from __future__ import annotations

import logging
import os
import resource
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import cache, partial

import torch
from tqdm import tqdm

from mrl.config.inert import find_inert_on_cpu, find_inert_without_ray
from mrl.config.load import save_config
from mrl.config.schema import PPOConfig
from mrl.doctor import refuse_wrong_apex
from mrl.interfaces import USER_ERRORS
from mrl.launch.board import PeerFailedError
from mrl.launch.environment import RankEnvironment, detect_launcher, read_task
from mrl.launch.fork import RankMain
from mrl.launch.hosts import Job, join_job
from mrl.launch.ray_driver import launch_on_ray
from mrl.launch.restart import RunFailed, run_with_restarts
from mrl.observability.console import setup_logging, show_table
from mrl.observability.report import summarize_run
from mrl.trainer.inputs import RunInputs, load_inputs
from mrl.trainer.machine import check_gpus
from mrl.trainer.plan import RunPlan, plan_run, run_folder
from mrl.trainer.resume import set_aside_history
from mrl.trainer.run_folder import claim_run_folder

logger = logging.getLogger(__name__)

_OPEN_FILES = 1 << 16


def launch(config: PPOConfig) -> int:
    """Train as configured and return the exit status."""
    prepare_process()
    trainer = config.trainer
    try:
        refuse_wrong_apex()
        launcher = detect_launcher(trainer.launcher, os.environ)
        if launcher == "ray":
            return launch_on_ray(config)
        if trainer.launcher == "auto" and launcher != "host":
            for line in find_inert_without_ray(config):
                logger.warning(line)
        task = read_task(launcher, os.environ)
        if not task.runs_host(num_nodes=trainer.nnodes, ranks_per_node=trainer.n_gpus_per_node):
            _refuse_restarts(trainer.max_restarts)
        with (
            claim_run_folder(run_folder(config)) if task.index == 0 else nullcontext(),
            join_job(
                task,
                num_nodes=trainer.nnodes,
                ranks_per_node=trainer.n_gpus_per_node,
                interface=trainer.network_interface,
                timeout=timedelta(seconds=trainer.ray_wait_register_center_timeout),
            ) as job,
        ):
            status = _launch_host(config, job) if job.runs_host else _launch_rank(config, job.ranks[0])
            if status == 0:
                job.leave()
            return status
    except (*USER_ERRORS, PeerFailedError) as error:
        logger.error("%s", error)
        return 1


def _refuse_restarts(max_restarts: int) -> None:
    """Raise ValueError where a rank is its launcher's own task, so that nothing here could start it again."""
    if max_restarts:
        raise ValueError(
            f"trainer.max_restarts = {max_restarts} cannot act with one task per rank: only what started a rank can "
            f"start it again. Use the launcher's (torchrun --max-restarts={max_restarts}, sbatch --requeue), or start "
            "one task per host (--nproc-per-node=1, --ntasks-per-node=1), and leave trainer.max_restarts=0 otherwise"
        )


def prepare_process() -> None:
    # Megatron relies on one hardware queue to start communication before the matmul it overlaps with.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _allow_open_files()
    # Its thread, which only redraws stalled bars, would be in the way of forks.
    tqdm.monitor_interval = 0
    # The engines' own remarks, once per rank, on things that no user of this package can change.
    for package in ("megatron", "sglang", "torchao", "transformers", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)


def _allow_open_files() -> None:
    """As many as the hard limit permits: a rank of a large job takes hundreds for its groups' connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _launch_host(config: PPOConfig, job: Job) -> int:
    start = time.perf_counter()
    first = job.ranks[0].rank
    setup_logging(rank=first)
    try:
        run_with_restarts(
            partial(_prepare_host, config, job),
            job.ranks,
            max_restarts=config.trainer.max_restarts,
            user_errors=USER_ERRORS,
        )
    except RunFailed as failure:
        logger.error("%s", failure)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; all ranks are stopped, %s keeps what was written", run_folder(config))
        return 130
    if first == 0:
        show_table("Result", summarize_run(run_folder(config), wall_s=time.perf_counter() - start))
    return 0


def _prepare_host(config: PPOConfig, job: Job) -> RankMain:
    """What each rank of this host runs, continuing from the newest checkpoint that there is now."""
    plan = _plan_here(config)
    inputs = load_inputs(config, plan)
    if job.ranks[0].rank == 0:
        announce(config, plan)
    logger.info("importing Megatron and SGLang, then forking %d ranks", len(job.ranks))
    if plan.device == "cpu":
        # Not with GPUs: the imports create a CUDA context, which no forked process could use.
        preload()
    return partial(_run_rank, config, plan, inputs)


def _plan_here(config: PPOConfig) -> RunPlan:
    plan = plan_run(config)
    if plan.device == "cuda":
        check_gpus(config.trainer.n_gpus_per_node)
    return plan


def _launch_rank(config: PPOConfig, env: RankEnvironment) -> int:
    setup_logging(rank=env.rank)
    env.export()
    plan = _plan_here(config)
    inputs = load_inputs(config, plan)
    if env.rank == 0:
        announce(config, plan)
    _run_rank(config, plan, inputs, env)
    if env.rank == 0:
        show_table("Result", summarize_run(plan.run_dir))
    return 0


def _run_rank(config: PPOConfig, plan: RunPlan, inputs: RunInputs, env: RankEnvironment) -> None:
    if plan.device == "cuda":
        _refuse_inherited_cuda()
        # Before the imports: what they do with CUDA then happens on the rank's own GPU.
        torch.cuda.set_device(env.local_rank)
    preload()
    from mrl.trainer.build import run_rank

    run_rank(config, plan, inputs, env)


def _refuse_inherited_cuda() -> None:
    """RuntimeError in a rank that was forked after CUDA had started: it could not use it, and would say so late."""
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "CUDA was started in the process that launched the ranks before it forked them, so they cannot use it. An "
            "import did that: look for modules that touch CUDA when imported (sitecustomize, plugins of transformers), "
            "or start one task per rank (torchrun --nproc-per-node), which forks nothing"
        )


@cache
def preload() -> None:
    """Import everything a rank needs. Megatron first: SGLang's imports pull it in unprepared for a CPU."""
    from mrl.backends.megatron.preload import preload_megatron

    preload_megatron()
    from mrl.backends.sglang.preload import preload_sglang

    preload_sglang()


def announce(config: PPOConfig, plan: RunPlan) -> None:
    """Show what will run and make its folder; what an earlier run wrote there is kept."""
    show_table("PPO", plan.rows())
    show_table(plan.memory_title, plan.memory.rows())
    if plan.device == "cpu" and config.trainer.device == "auto":
        for line in find_inert_on_cpu(config):
            logger.warning(line)
    set_aside_history(plan.run_dir, plan.resume)
    save_config(config, plan.run_dir / "config.yaml")
