"""Which settings have no effect when: the tables behind `mrl.config.inert`."""

from __future__ import annotations

from mrl.config.inert_rules.advantages import ESTIMATOR_RULES, KL_RULES
from mrl.config.inert_rules.losses import CORRECTION_RULES, LOSS_RULES
from mrl.config.inert_rules.roles import BATCH_RULES, CPU_RULES, PADDING_RULES, ROLE_RULES
from mrl.config.inert_rules.rule import Rule
from mrl.config.inert_rules.run import RAY_RULES, ROLLOUT_RULES, RUN_RULES

__all__ = ["CPU_RULES", "RAY_RULES", "RULES", "Rule"]

RULES = (
    *KL_RULES,
    *ESTIMATOR_RULES,
    *LOSS_RULES,
    *CORRECTION_RULES,
    *BATCH_RULES,
    *PADDING_RULES,
    *ROLE_RULES,
    *ROLLOUT_RULES,
    *RUN_RULES,
)
