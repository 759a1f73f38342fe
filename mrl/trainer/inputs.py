"""Tokenizer and prompts of a run, read once in the launching process."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mrl.config.errors import ConfigError
from mrl.config.frozen import thaw
from mrl.config.schema import PPOConfig
from mrl.data.dataset import PromptDataset, load_prompts
from mrl.data.loader import PromptLoader
from mrl.data.tokenizer import load_eos_token_ids, load_tokenizer
from mrl.data.turn_encoder import TurnEncoder
from mrl.trainer.conversations import load_turn_encoder
from mrl.trainer.plan import RunPlan
from mrl.trainer.reward_model import ConversationEncoder, load_encoder
from mrl.trainer.rewards import check_rewards
from mrl.trainer.role_plan import RolePlan

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, frozen=True)
class RunInputs:
    """What ranks inherit from the process that forks them."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    prompts: PromptLoader
    """Training prompts in the configured order."""
    val: PromptDataset | None
    reward_encoder: ConversationEncoder | None
    """How the reward model reads samples, if there is one."""
    turn_encoder: TurnEncoder | None
    """How an environment's messages become tokens, if there is one."""


def load_inputs(config: PPOConfig, plan: RunPlan) -> RunInputs:
    """Tokenizer and prompts.

    Raises:
        ValueError: files that are missing, empty or of the wrong form, no prompt that fits, fewer prompts than a
            batch, rewards that cannot be computed (see `check_rewards`), or steps to trace beyond the run's last.
    """
    # Ranks are forked from this process; the tokenizer's thread pool would not survive that.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = config.actor_rollout_ref.model.tokenizer_path or plan.actor.model_path
    tokenizer = load_tokenizer(folder)
    train = _load(config, plan.train_files, tokenizer, config.data.train_max_samples)
    val = _load(config, plan.val_files, tokenizer, config.data.val_max_samples) if plan.val_files else None
    data = config.data
    seed = config.trainer.seed if data.seed is None else data.seed
    check_rewards(config.reward, {prompt.data_source for prompt in (*train, *(val or ()))})
    prompts = PromptLoader(train.prompts, batch_size=config.gen_batch_size, shuffle=data.shuffle, seed=seed)
    _check_profile(config, count_steps(config, prompts), completed=plan.resume.manifest.step if plan.resume else 0)
    return RunInputs(
        tokenizer=tokenizer,
        eos_token_ids=load_eos_token_ids(plan.actor.model_path, tokenizer),
        prompts=prompts,
        val=val,
        reward_encoder=_load_reward_encoder(plan.reward_model),
        turn_encoder=load_turn_encoder(config, tokenizer),
    )


def count_steps(config: PPOConfig, loader: PromptLoader) -> int:
    """PPO steps of the run. Those of `total_epochs` are counted as if dynamic sampling kept every prompt."""
    trainer = config.trainer
    prompts = trainer.total_epochs * loader.batches_per_epoch * config.gen_batch_size
    return trainer.total_training_steps or max(1, prompts // config.data.train_batch_size)


def _check_profile(config: PPOConfig, total_steps: int, *, completed: int) -> None:
    try:
        config.trainer.check_profile_steps(total_steps)
    except ConfigError as error:
        raise ConfigError(f"trainer.{error}") from None
    made = [step for step in config.trainer.profile_steps or () if step <= completed]
    if made:
        logger.warning("trainer.profile_steps = %s are not traced: the run continues from step %d", made, completed)


def _load_reward_encoder(role: RolePlan | None) -> ConversationEncoder | None:
    if role is None:
        return None
    tokenizer = load_tokenizer(role.model_path)
    return load_encoder(role.model_path, tokenizer, max_length=role.spec.max_position_embeddings)


def _load(
    config: PPOConfig, files: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_samples: int
) -> PromptDataset:
    data = config.data
    return load_prompts(
        files,
        tokenizer,
        max_prompt_length=data.max_prompt_length,
        prompt_key=data.prompt_key,
        reward_fn_key=data.reward_fn_key,
        filter_overlong_prompts=data.filter_overlong_prompts,
        truncation=data.truncation,
        max_samples=max_samples,
        apply_chat_template_kwargs=thaw(data.apply_chat_template_kwargs),
    )
