"""Pulls that fail half way, on CPU: a rank refuses, an engine process dies, a trainer's rank dies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fault_checks import CHECKS
from fault_jobs import FaultJob, Outcome, preload, run_job

# When tests are collected: those that run before may import SGLang, which brings megatron-core unprepared.
import mrl.backends.megatron  # noqa: F401

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    preload()
    return run_job(FaultJob(folder=tmp_path_factory.mktemp("job"), world_size=request.param, device="cpu"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_faults_in_the_middle_of_a_pull(outcome: Outcome, check: Callable[[Outcome], None]) -> None:
    check(outcome)
