"""What the actor's checkpoints hold: section `actor_rollout_ref.actor.checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrl.config.errors import ConfigError
from mrl.config.section import Section

Content = Literal["model", "optimizer", "extra", "hf_model"]
_NEEDED: tuple[Content, ...] = ("model", "optimizer", "extra")


@dataclass(kw_only=True, frozen=True)
class ActorCheckpointConfig(Section):
    """Contents of the actor's checkpoints."""

    save_contents: tuple[Content, ...] = _NEEDED
    """What to save; the first three are needed to resume, hf_model adds a model for transformers and SGLang."""

    def check(self) -> None:
        missing = [name for name in _NEEDED if name not in self.save_contents]
        if missing:
            raise ConfigError(
                f"save_contents = {list(self.save_contents)} lacks {missing[0]!r}, without which no run can resume; "
                f"give {list(_NEEDED)}, with or without 'hf_model'"
            )

    @property
    def exports_hugging_face(self) -> bool:
        """Whether a Hugging Face model is written with each checkpoint."""
        return "hf_model" in self.save_contents
