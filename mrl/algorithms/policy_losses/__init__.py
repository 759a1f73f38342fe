"""Policy losses by their name in `actor_rollout_ref.actor.policy_loss.loss_mode`: one file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mrl.algorithms.policy_losses.base import BoundPolicyLoss, PolicyInputs, PolicyLoss, PolicyTerms
from mrl.algorithms.policy_losses.cispo import CISPO
from mrl.algorithms.policy_losses.clip_cov import ClipCov
from mrl.algorithms.policy_losses.dppo import DPPOKL, DPPOTV
from mrl.algorithms.policy_losses.dro import DRO
from mrl.algorithms.policy_losses.geo_mean import GeoMean
from mrl.algorithms.policy_losses.gpg import GPG
from mrl.algorithms.policy_losses.gspo import GSPO
from mrl.algorithms.policy_losses.kl_cov import KLCov
from mrl.algorithms.policy_losses.sapo import SAPO
from mrl.algorithms.policy_losses.vanilla import Vanilla

__all__ = ["POLICY_LOSSES", "BoundPolicyLoss", "PolicyInputs", "PolicyLoss", "PolicyTerms", "build_policy_loss"]

POLICY_LOSSES: Mapping[str, type[PolicyLoss]] = {
    "vanilla": Vanilla,
    "gspo": GSPO,
    "cispo": CISPO,
    "gpg": GPG,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "geo_mean": GeoMean,
    "sapo": SAPO,
    "dppo_tv": DPPOTV,
    "dppo_kl": DPPOKL,
    "dro": DRO,
}
"""The loss behind each name; its fields are the config keys that it takes."""


def build_policy_loss(loss_mode: str, settings: Mapping[str, Any]) -> PolicyLoss:
    """The named loss with those of `settings` that it takes.

    Raises:
        ValueError: there is none of that name, or a setting is out of range.
    """
    if loss_mode not in POLICY_LOSSES:
        raise ValueError(f"policy_loss.loss_mode = {loss_mode!r} is unknown; known: {', '.join(POLICY_LOSSES)}")
    loss = POLICY_LOSSES[loss_mode]
    return loss(**{item.name: settings[item.name] for item in fields(loss)})
