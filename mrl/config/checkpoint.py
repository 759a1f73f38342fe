"""What a role's checkpoints hold: sections `actor_rollout_ref.actor.checkpoint` and `critic.checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrl.config.errors import ConfigError
from mrl.config.section import Section

Content = Literal["model", "optimizer", "extra", "hf_model"]
RESUMABLE: tuple[Content, ...] = ("model", "optimizer", "extra")


@dataclass(kw_only=True, frozen=True)
class CheckpointConfig(Section):
    """Contents of a role's checkpoints."""

    save_contents: tuple[Content, ...] = RESUMABLE
    """What to save; the first three are needed to resume, hf_model (actor only) is one for transformers and SGLang."""
    load_contents: tuple[Content, ...] = RESUMABLE
    """What a resumed run loads; without optimizer moments start anew, without extra learning rate and random states."""
    async_save: bool = False
    """Copy the state to host memory and write it while training goes on."""

    def check(self) -> None:
        missing = [name for name in RESUMABLE if name not in self.save_contents]
        if missing:
            raise ConfigError(
                f"save_contents = {list(self.save_contents)} lacks {missing[0]!r}, without which no run can resume; "
                f"give {list(RESUMABLE)}, with or without 'hf_model'"
            )
        if "hf_model" in self.load_contents:
            raise ConfigError(
                f"load_contents = {list(self.load_contents)} names 'hf_model', which is for other programs: a run "
                "resumes from 'model'; to begin from an exported model, give its folder as the role's model.path"
            )
        if "model" not in self.load_contents:
            raise ConfigError(
                f"load_contents = {list(self.load_contents)} lacks 'model', without which nothing is resumed; add it, "
                "or set trainer.resume_mode=disable to start anew"
            )

    @property
    def exports_hugging_face(self) -> bool:
        """Whether a Hugging Face model is written with each checkpoint."""
        return "hf_model" in self.save_contents


@dataclass(kw_only=True, frozen=True)
class CriticCheckpointConfig(CheckpointConfig):
    """Contents of the critic's checkpoints."""

    def check(self) -> None:
        super().check()
        if self.exports_hugging_face:
            raise ConfigError(
                f"save_contents = {list(self.save_contents)} names 'hf_model', but a value head has no place in a "
                "Hugging Face causal model; remove it"
            )
