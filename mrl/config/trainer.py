"""Settings of the run: section `trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from mrl.config.checks import at_least, more_than
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict
from mrl.config.section import Section

PHASES = (
    "start",
    "rollout",
    "reward",
    "switch",
    "reward_model",
    "log_prob",
    "ref_log_prob",
    "value",
    "advantage",
    "update_critic",
    "update_actor",
    "save",
    "reshard",
    "validation",
    "step",
    "loop",
)
"""What a run is always in one of, the innermost that is open; `step` and `loop` lie between the others."""


@dataclass(kw_only=True, frozen=True)
class TrainerConfig(Section):
    """Length, place and outputs of a run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is any."""
    launcher: Literal["auto", "local", "torchrun", "slurm", "ray"] = "auto"
    """What starts the ranks; auto reads the environment and starts them itself if nothing has."""
    nnodes: int = 1
    """Hosts."""
    n_gpus_per_node: int = 8
    """Ranks per host; on CPU, processes."""
    total_epochs: int = 30
    """Passes over the training prompts."""
    total_training_steps: int | None = None
    """Steps of the run; null follows from `total_epochs`."""
    critic_warmup: int = 0
    """Steps in which only the critic is trained."""
    balance_batch: bool = True
    """Accepted for compatibility; data-parallel ranks always get equal shares of tokens."""
    seed: int = 42
    """Seed of sampling and of every order that has no seed of its own."""
    project_name: str = "mrl_examples"
    """Groups runs in the trackers."""
    experiment_name: str = "gsm8k"
    """Names the run in the trackers."""
    default_local_dir: str = "checkpoints/mrl_examples/gsm8k"
    """Folder of the run's outputs; checkpoints/<project_name>/<experiment_name> unless set."""
    default_hdfs_dir: str | None = None
    """Accepted for compatibility; nothing is copied to HDFS."""
    logger: tuple[Literal["console", "tensorboard", "wandb", "file"], ...] = ("console", "tensorboard", "file")
    """Where metrics go; file is metrics.jsonl in `default_local_dir`, which is always written. wandb is a package of
    its own (`pip install wandb`)."""
    log_val_generations: int = 0
    """Validation samples to log in each round."""
    rollout_data_dir: str | None = None
    """Folder for the samples of each step; null is samples/ in `default_local_dir`."""
    validation_data_dir: str | None = None
    """Folder for the samples of each validation; null is samples/ in `default_local_dir`."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """Validate once and stop."""
    test_freq: int = -1
    """Validate every so many steps; -1 is never."""
    save_freq: int = -1
    """Save a checkpoint every so many steps and after the last one; -1 is never."""
    max_actor_ckpt_to_keep: int | None = None
    """Newest checkpoints whose actor is kept, the others' is removed; null is all."""
    max_critic_ckpt_to_keep: int | None = None
    """The same for the critic; a checkpoint resumes with both only."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """Go on from the newest checkpoint if there is one, start anew, or go on from `resume_from_path`."""
    resume_from_path: str | None = None
    """Checkpoint folder for `resume_mode=resume_path`."""
    ray_wait_register_center_timeout: int = 300
    """Longest wait for the job's hosts to join, in seconds, whatever starts them; on Ray first of all to be free."""
    network_interface: str | None = None
    """Interface, such as ib0, whose address each host has for the others, for all but NCCL's own transports; null takes
    GLOO_SOCKET_IFNAME, else the interface that leads to host 0. MRL_HOST_ADDRESS, set on a host, overrides it."""
    threads_per_rank: int | None = None
    """CPU threads of each rank's own work on a step's batch. null: on GPUs its share of the host's cores less 2, at
    most 16 and the same on every rank; on a CPU OMP_NUM_THREADS, as models and engines compute there, too."""
    engine_start_timeout_s: float = 600.0
    """Longest start of a rollout engine, in seconds."""
    engine_call_timeout_s: float = 1800.0
    """Longest single call to a rollout engine, in seconds; while it generates, longest time between two responses."""
    reshard_timeout_s: float = 600.0
    """Longest exchange of weights between hosts in one update, in seconds; at most `engine_call_timeout_s`."""
    phase_timeout_s: float = 3600.0
    """Longest phase of a run, in seconds; then the run ends with a report of what each rank was doing."""
    phase_timeouts_s: Mapping[str, float] = field(default_factory=FrozenDict)
    """The same for single phases by name, such as `{rollout: 7200}`; the names are those of the `time/` metrics, and
    start, validation, step and loop (between the phases of a step, and between steps)."""
    max_restarts: int = 0
    """Times that a run whose ranks died or hang is started again from its last checkpoint, on the same hosts. Errors
    that name what to change end it at once. Refused with one task per rank, where torchrun --max-restarts does it."""

    profile_steps: tuple[int, ...] | None = None
    """Steps to trace, such as [3,4]: `profile/step_<n>_rank_<r>.json.gz` in `default_local_dir`, for Perfetto or
    chrome://tracing, and on GPUs a snapshot of the memory beside it; null is none."""
    profile_ranks: Literal["all"] | tuple[int, ...] = (0,)
    """Ranks that trace those steps, or all."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nnodes * self.n_gpus_per_node

    @property
    def validates(self) -> bool:
        """Whether the run validates at any time."""
        return self.val_before_train or self.val_only or self.test_freq > 0

    def profiled_steps(self, rank: int) -> tuple[int, ...]:
        """The steps that this rank is to trace."""
        return (self.profile_steps or ()) if self.profile_ranks == "all" or rank in self.profile_ranks else ()

    def check(self) -> None:
        at_least(self, 1, "nnodes", "n_gpus_per_node", "total_epochs", "total_training_steps", "threads_per_rank")
        at_least(self, 1, "max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep")
        at_least(self, 0, "critic_warmup", "log_val_generations", "max_restarts")
        # A folder of the same name, which a run leaves, passes for a package without an origin.
        if "wandb" in self.logger and getattr(find_spec("wandb"), "origin", None) is None:
            raise ConfigError("logger names wandb, which is not installed: pip install wandb, or leave it out")
        self._check_phase_timeouts()
        self._check_profile()
        more_than(self, 0, "engine_start_timeout_s", "engine_call_timeout_s", "phase_timeout_s", "reshard_timeout_s")
        if self.nnodes > 1 and self.reshard_timeout_s > self.engine_call_timeout_s:
            raise ConfigError(
                f"reshard_timeout_s = {self.reshard_timeout_s} exceeds engine_call_timeout_s = "
                f"{self.engine_call_timeout_s}: the call would end before the exchange could say what is missing; "
                "lower it"
            )
        more_than(self, 0, "ray_wait_register_center_timeout")
        if self.launcher == "local" and self.nnodes > 1:
            raise ConfigError(f"launcher = local starts ranks on one host, but nnodes = {self.nnodes}; use torchrun")
        if self.resume_mode == "resume_path" and self.resume_from_path is None:
            raise ConfigError("resume_mode = resume_path needs resume_from_path, which is null")
        if self.max_restarts and (self.resume_mode != "auto" or self.save_freq <= 0):
            raise ConfigError(
                f"max_restarts = {self.max_restarts} continues from checkpoints of the run itself, which needs "
                f"save_freq > 0 and resume_mode = auto, not {self.save_freq} and {self.resume_mode}"
            )
        steps = self.total_training_steps
        if steps is not None and self.critic_warmup >= steps and not self.val_only:
            raise ConfigError(
                f"critic_warmup = {self.critic_warmup} leaves no step for the actor in total_training_steps = {steps}; "
                "lower it"
            )

    def _check_phase_timeouts(self) -> None:
        for phase, seconds in self.phase_timeouts_s.items():
            if phase not in PHASES:
                raise ConfigError(f"phase_timeouts_s names phase {phase!r}; there are {', '.join(PHASES)}")
            if seconds <= 0:
                raise ConfigError(f"phase_timeouts_s.{phase} = {seconds} must be above 0")

    def _check_profile(self) -> None:
        for step in self.profile_steps or ():
            if step < 1:
                raise ConfigError(f"profile_steps names step {step}; steps count from 1")
        if self.total_training_steps is not None:
            self.check_profile_steps(self.total_training_steps)
        if self.profile_ranks == "all":
            return
        if self.profile_steps and not self.profile_ranks:
            raise ConfigError(
                "profile_ranks is empty, so no rank would trace profile_steps; name one, or set it to all"
            )
        for rank in self.profile_ranks:
            if not 0 <= rank < self.world_size:
                raise ConfigError(f"profile_ranks names rank {rank}; the job has ranks 0 to {self.world_size - 1}")

    def check_profile_steps(self, total_steps: int) -> None:
        """Raise ConfigError if a step to trace lies beyond the run's last."""
        for step in self.profile_steps or ():
            if step > total_steps:
                raise ConfigError(f"profile_steps names step {step}; the run has {total_steps}")
