"""The front over engines that answer deterministically; the engines themselves are tested in tests/integration."""

import multiprocessing
import time
from array import array
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from model_specs import make_spec

from mrl.interfaces import EngineDiedError, EngineError, WeightUpdateReport
from mrl.launch.fork import RankFailure, run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.reshard.layout import SourceRank
from mrl.reshard.peer_sums import PeerSums
from mrl.reshard.spec import ModelSpec
from mrl.rollout.colocated import ColocatedRollout
from mrl.types import Generation, Prompt, SamplingParams

SPEC = make_spec(
    family="llama",
    vocab_size=8,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
    attention_bias=False,
)
PROMPTS = [Prompt(uid=str(i), token_ids=[i + 1, i + 2], messages=[], data_source="task") for i in range(11)]
PARAMS = SamplingParams(max_new_tokens=4)


def answer(ids, version):
    """The reverse of the prompt and its sum."""
    return Generation(
        response_ids=array("i", [*reversed(ids), sum(ids)]),
        rollout_log_probs=array("f", [-0.25, -0.5, -float(sum(ids))]),
        finish_reason="length",
        weight_version=version,
    )


@dataclass
class Reversing:
    """Answers with the reversed prompt; `delay_s` per prompt, fails where told."""

    delay_s: float = 0.0
    tp_size: int = 1
    fails_on: str = ""
    version: int = -1
    controls: list = field(default_factory=list)
    answered: int = 0
    widest: int = 0
    peer_sums: tuple = ()
    refused: str = ""

    def generate(self, prompts, params):
        self._check("generate")
        self.answered += len(prompts)
        return [answer(ids, self.version) for ids in prompts]

    def generate_from(self, take, params, *, window):
        self._check("generate")
        answers = {}
        self.widest = window
        while taken := take(1):
            time.sleep(self.delay_s)
            answers |= {index: answer(ids, self.version) for index, ids in taken}
        self.answered += len(answers)
        return answers

    def update_weights(self, control, *, weight_version, redo=0):
        self._check("update")
        self.controls.append(control)
        self.version = weight_version
        self.refused = ""
        return WeightUpdateReport(
            weight_version=weight_version, bytes=1000, ops=3, pull_s=0.5, call_s=0.75, peer_sums=self.peer_sums
        )

    def refuse_weights(self, reason):
        self.refused = reason

    def release_memory(self, tags):
        self._check("release")

    def resume_memory(self, tags):
        self._check("resume")

    def shutdown(self):
        self.version = -99

    def _check(self, what):
        if what == "generate" and self.refused:
            raise EngineError(f"engine cannot generate: {self.refused}")
        if self.fails_on == what:
            raise EngineError(f"no {what} today")


@dataclass
class Mortal(Reversing):
    """Dies at the prompt whose number is in `dies_at`, or in the update whose is, and is whole after a restart."""

    dies_at: tuple[int, ...] = ()
    """At such a prompt `a_death` is set; an engine without any waits for it with its first prompt in hand."""
    a_death: Any = None
    dies_in_update: int = -1
    redos: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    dead: bool = False

    def generate(self, prompts, params):
        places = iter(enumerate(prompts))

        def take(free):
            return [place] if (place := next(places, None)) else []

        return list(self.generate_from(take, params, window=1).values())

    def generate_from(self, take, params, *, window):
        answers = {}
        while taken := take(1):
            [(index, ids)] = taken
            self.asked.append(ids)
            if self.a_death is not None and not self.dies_at:
                assert self.a_death.wait(50)
            if len(self.asked) - 1 in self.dies_at:
                self._die(answers)
            answers[index] = answer(ids, self.version)
        return answers

    def update_weights(self, control, *, weight_version, redo=0):
        self.redos.append(redo)
        if self.dead or len(self.redos) - 1 == self.dies_in_update:
            self._die({})
        return super().update_weights(control, weight_version=weight_version)

    def restart(self):
        self.version, self.dead = -1, False

    def _die(self, answers):
        self.dead = True
        if self.a_death is not None:
            self.a_death.set()
        error = EngineDiedError("killed")
        error.finished = answers
        raise error


def source(rank):
    return SourceRank(rank=rank, tp_rank=0, tp_size=1, host="here", device=-1, dtype="float32", buffers=(), params=())


def run(world_size, scenario):
    def rank_main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
        try:
            return scenario(env.rank)
        finally:
            dist.destroy_process_group()

    return run_ranks(rank_main, world_size, timeout_s=60)


def front(rank, engines, **kwargs):
    return ColocatedRollout(engines.get(rank), spec=SPEC, source=source(rank), **kwargs)


@pytest.mark.parametrize("leaders", [(0,), (2,), (0, 2)])
def test_every_rank_gets_every_sample_in_order(leaders):
    def scenario(rank):
        rollout = front(rank, {leader: Reversing() for leader in leaders}, weight_version=7)
        rollout.update_weights()
        samples = rollout.generate(PROMPTS, PARAMS)
        return [(sample.prompt.uid, sample.generation) for sample in samples], rollout.metrics["rollout/tokens"]

    expected = [(prompt.uid, answer(prompt.token_ids, 7)) for prompt in PROMPTS]
    assert run(4, scenario) == [(expected, 33.0)] * 4


def test_a_slow_engine_does_not_idle_the_other():
    def scenario(rank):
        engine = Reversing(delay_s=0.15 if rank == 0 else 0.0)
        rollout = front(rank, {rank: engine}, max_running_requests=64)
        rollout.generate(PROMPTS, PARAMS)
        return engine.answered, engine.widest

    (slow, slow_window), (fast, fast_window) = run(2, scenario)
    assert slow + fast == len(PROMPTS)
    assert slow <= 3
    assert slow_window == fast_window == 6  # an equal share of 11 prompts, rounded up


@pytest.mark.parametrize("what", ["generate", "update"])
def test_one_failing_engine_is_raised_alike_on_every_rank(what):
    def scenario(rank):
        rollout = front(rank, {0: Reversing(delay_s=0.01), 2: Reversing(fails_on=what)})
        try:
            rollout.update_weights()
            rollout.generate(PROMPTS * 300, PARAMS)
        except EngineError as error:
            return str(error)
        return "no error"

    begin = time.perf_counter()
    assert run(3, scenario) == [f"rollout engine of rank 2: no {what} today"] * 3
    assert time.perf_counter() - begin < 25  # the healthy engine stops taking: 3,300 prompts would last 33 s


def test_generation_goes_on_after_a_failed_update():
    def scenario(rank):
        engine = Reversing(fails_on="update")
        rollout = front(rank, {0: engine} if rank == 0 else {})
        with pytest.raises(EngineError):
            rollout.update_weights()
        engine.fails_on = ""
        return rollout.update_weights()["rollout/weight_version"], len(rollout.generate(PROMPTS, PARAMS))

    assert run(2, scenario) == [(0.0, len(PROMPTS))] * 2


@pytest.mark.parametrize("served", [{0: 6}, {}])
def test_weights_that_did_not_arrive_whole_are_refused_alike_on_every_rank(served):
    def scenario(rank):
        reader = Reversing(peer_sums=(PeerSums(rank=0, arrived={1: 7}, served={}),))
        owner = Reversing(peer_sums=(PeerSums(rank=1, arrived={}, served=served),))
        engine = {0: reader, 2: owner}.get(rank)
        rollout = front(rank, {0: reader, 2: owner})
        errors = []
        for action in (rollout.update_weights, lambda: rollout.generate(PROMPTS, PARAMS)):
            with pytest.raises(EngineError) as caught:
                action()
            errors.append(str(caught.value))
        refused = rollout.weight_version
        owner.peer_sums = (PeerSums(rank=1, arrived={}, served={0: 7}),)
        rollout.update_weights()
        renewals = [control["engines"]["renewals"] for control in engine.controls] if engine else [0, 1]
        return errors, refused, renewals, rollout.weight_version, len(rollout.generate(PROMPTS, PARAMS))

    outcomes = run(3, scenario)
    assert outcomes == [outcomes[0]] * 3
    (update, generate), *rest = outcomes[0]
    assert update.startswith("engine rank 0 read weights from the device of engine rank 1: the checksum")
    assert "engine cannot generate: the last weight update failed; repeat it: engine rank 0 read" in generate
    assert rest == [-1, [0, 1], 0, len(PROMPTS)]


def test_metrics_add_up_over_engines_and_the_control_message_is_one_object():
    def scenario(rank):
        engines = {0: Reversing(), 1: Reversing()}
        rollout = front(rank, engines)
        first, second = rollout.update_weights(), rollout.update_weights()
        controls = engines[rank].controls
        assert controls[0] is controls[1]
        assert [each["rank"] for each in controls[0]["sources"]] == [0, 1]
        assert ModelSpec.from_json(controls[0]["spec"]) == SPEC
        rollout.release_memory(["weights"])
        rollout.resume_memory(["weights"])
        rollout.close()
        assert engines[rank].version == -99
        return first, second["rollout/weight_version"]

    for metrics, version in run(2, scenario):
        assert metrics["reshard/bytes"] == 2000
        assert metrics["reshard/ops"] == 6
        assert metrics["reshard/gb_per_s"] == pytest.approx(2000 / 0.5 / 1e9)
        assert (metrics["rollout/weight_version"], version) == (0.0, 1.0)


def test_a_job_of_one_process_needs_no_process_group():
    rollout = ColocatedRollout(Reversing(), spec=SPEC, source=source(0))
    rollout.update_weights()
    assert [sample.generation for sample in rollout.generate(PROMPTS, PARAMS)] == [
        answer(prompt.token_ids, 0) for prompt in PROMPTS
    ]


def test_no_engine_anywhere_is_refused_on_every_rank():
    with pytest.raises(RankFailure, match="no rank owns a rollout engine"):
        run(2, lambda rank: front(rank, {}))


@pytest.mark.parametrize("leaders", [(0,), (1,), (0, 1)])
def test_a_dead_engines_unfinished_prompts_are_answered_after_its_restart(leaders):
    a_death = multiprocessing.get_context("fork").Event()

    def scenario(rank):
        engines = {each: Mortal(dies_at=(2,) if each == leaders[-1] else (), a_death=a_death) for each in leaders}
        rollout = front(rank, engines, weight_version=7, max_engine_restarts=1)
        rollout.update_weights()
        samples = rollout.generate(PROMPTS, PARAMS)
        restarts = rollout.metrics["rollout/engine_restarts"]
        rollout.generate(PROMPTS[:1], PARAMS)
        engine = engines.get(rank)
        asked = [ids for ids in engine.asked[:-1]] if engine else []
        return (
            [sample.generation for sample in samples],
            (restarts, rollout.metrics["rollout/engine_restarts"]),
            engine.redos if engine else None,
            asked,
            [control["engines"]["renewals"] for control in engine.controls] if engine else None,
        )

    outcomes = run(2, scenario)
    for generations, restarts, redos, _, controls in outcomes:
        assert generations == [answer(prompt.token_ids, 7) for prompt in PROMPTS]
        assert restarts == (1.0, 0.0)
        assert redos in (None, [0, 1])
        assert controls in (None, [0, 1])
    if len(leaders) == 1:
        [asked] = [asked for _, _, redos, asked, _ in outcomes if redos]
        prompts = [prompt.token_ids for prompt in PROMPTS]
        # The two that were finished are kept.
        assert asked == prompts[:3] + prompts[2:]


def test_an_engine_that_dies_in_an_update_gets_the_same_version_after_its_restart():
    def scenario(rank):
        engines = {0: Mortal(dies_in_update=1), 1: Mortal()}
        room = []
        rollout = front(rank, engines, max_engine_restarts=1, make_room=lambda: room.append(engines[0].dead))
        versions = [rollout.update_weights()["rollout/weight_version"] for _ in range(3)]
        samples = rollout.generate(PROMPTS, PARAMS)
        return versions, {sample.generation.weight_version for sample in samples}, len(engines[rank].redos), room

    expected = [0.0, 1.0, 2.0], {2}, 4
    # On every rank, and before the engine is there again.
    assert run(2, scenario) == [(*expected, [True]), (*expected, [False])]


def test_an_engine_that_keeps_dying_ends_the_run_with_its_own_error():
    def scenario(rank):
        rollout = front(rank, {0: Mortal(dies_at=(0, 1, 2, 3, 4, 5))}, max_engine_restarts=2)
        rollout.update_weights()
        with pytest.raises(EngineError, match=r"killed\n2 restarts.*max_engine_restarts = 2 allows no more") as caught:
            rollout.generate(PROMPTS, PARAMS)
        return str(caught.value)

    first, second = run(2, scenario)
    assert first == second
