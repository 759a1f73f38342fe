"""The real SGLang engine on CPU. Scenarios run in processes of their own; tests look at what these observed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_jobs as jobs
import torch
import torch.distributed as dist

from mrl.backends.sglang import hooks
from mrl.backends.sglang.arguments import child_environment
from mrl.backends.sglang.preload import preload_sglang
from mrl.interfaces import EngineDiedError
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.reshard.spec import load_spec
from mrl.rollout.colocated import ColocatedRollout
from mrl.types import Prompt, SamplingParams

pytestmark = pytest.mark.engine

GREEDY = 16


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    preload_sglang()
    folder = tmp_path_factory.mktemp("model")
    jobs.make_model(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def observed(request, model_folder):
    return jobs.in_own_process(observe_engine, model_folder, request.param)


def observe_engine(folder: Path, tp_size: int) -> dict[str, Any]:
    before = jobs.surroundings()
    trained = jobs.TrainedEngine(folder, tp_size=tp_size, updated=False)
    engine, seen = trained.engine, {"tp_size": tp_size}
    changed = jobs.differences(before, jobs.surroundings())
    seen["changed while running"] = sorted(changed)
    seen["signals while running"] = changed.get("signals")
    seen["before the first update"] = jobs.error_of(lambda: engine.generate([[5]], jobs.sampling(1)))
    try:
        observe_generation(trained, seen)
        observe_updates(trained, seen)
    finally:
        engine.shutdown()
    engine.shutdown()
    seen["left behind"] = jobs.differences(before, jobs.surroundings())
    seen["after shutdown"] = jobs.error_of(lambda: engine.generate([[5]], jobs.sampling(1)))
    return seen


def observe_generation(trained: jobs.TrainedEngine, seen: dict[str, Any]) -> None:
    engine = trained.engine
    seen["report"] = trained.update()
    greedy = engine.generate(jobs.PROMPTS, jobs.sampling(GREEDY, temperature=0.0))
    seen["greedy"] = [(list(each.response_ids), each.finish_reason, each.weight_version) for each in greedy]
    seen["transformers greedy"] = jobs.greedy(trained.model, GREEDY)
    seen["greedy log-prob error"] = trained.log_prob_error(greedy, 1.0)
    for temperature in (1.0, 0.7):
        sampled = engine.generate(jobs.PROMPTS, jobs.sampling(GREEDY, temperature=temperature, top_p=0.9))
        seen[f"log-prob error at {temperature}"] = trained.log_prob_error(sampled, temperature)
    stop = greedy[0].response_ids[5]
    stopped = engine.generate(
        jobs.PROMPTS[:1], SamplingParams(max_new_tokens=GREEDY, temperature=0.0, stop_token_ids=(stop,))
    )
    seen["stopped"] = (stop, list(stopped[0].response_ids), len(stopped[0].rollout_log_probs), stopped[0].finish_reason)
    prompts = list(enumerate(jobs.PROMPTS * 3))
    streamed = engine.generate_from(
        lambda free: [prompts.pop() for _ in range(min(free, len(prompts)))],
        jobs.sampling(GREEDY, temperature=0.0),
        window=4,
    )
    seen["streamed"] = [list(streamed[index].response_ids) for index in range(9)]
    refused = {
        "stop string": lambda: engine.generate([[5]], SamplingParams(max_new_tokens=1, stop=("end",))),
        "too long": lambda: engine.generate([[5] * 500], jobs.sampling(13)),
        "empty": lambda: engine.generate([[]], jobs.sampling(1)),
        "top_p": lambda: engine.generate([[5]], jobs.sampling(1, top_p=0.0)),
    }
    seen["refused"] = {name: jobs.error_of(work)[:2] for name, work in refused.items()}
    seen["longest"] = len(engine.generate([[5] * 500], jobs.sampling(12))[0].response_ids)


def observe_updates(trained: jobs.TrainedEngine, seen: dict[str, Any]) -> None:
    engine, params = trained.engine, jobs.sampling(GREEDY, temperature=1.0)
    first = engine.fingerprint_weights()
    engine.poison_weights()
    seen["generation of poison"] = jobs.error_of(lambda: engine.generate([[5]], jobs.sampling(1)))
    poisoned = engine.fingerprint_weights()
    seen["poison shows"] = [bad[name] != good[name] for bad, good in zip(poisoned, first, strict=True) for name in good]
    trained.update()
    seen["restored"] = engine.fingerprint_weights() == first
    trained.perturb()
    engine.poison_weights()
    trained.update()
    changed = engine.generate(jobs.PROMPTS, jobs.sampling(GREEDY, temperature=0.0))
    tokens = [list(each.response_ids) for each in changed]
    seen["after a step"] = (tokens, jobs.greedy(trained.model, GREEDY), trained.log_prob_error(changed, 1.0))
    seen["version after a step"] = (changed[0].weight_version, trained.version)
    samples = [[list(each.response_ids) for each in engine.generate(jobs.PROMPTS, params)] for _ in range(2)]
    engine.update_weights(trained.control, weight_version=trained.version)
    samples.append([list(each.response_ids) for each in engine.generate(jobs.PROMPTS, params)])
    seen["samples"] = samples

    whole = trained.control
    trained.control = whole | {"fail_on_rank": seen["tp_size"] - 1}
    seen["failed update"] = jobs.error_of(trained.update)
    seen["generation after it"] = jobs.error_of(lambda: engine.generate([[5]], jobs.sampling(1)))
    sources = [source | {"dtype": "bfloat16"} for source in whole["sources"]]
    trained.control = whole | {"sources": sources}
    seen["wrong dtype"] = jobs.error_of(trained.update)
    trained.control = whole | {"sources": whole["sources"][:2]}
    seen["missing stage"] = jobs.error_of(trained.update)
    trained.control = whole
    trained.update()
    engine.release_memory(["kv_cache", "weights"])
    engine.resume_memory(["weights", "kv_cache"])
    again = engine.generate(jobs.PROMPTS, jobs.sampling(GREEDY, temperature=0.0))
    seen["after repair"] = [list(each.response_ids) for each in again] == [list(each.response_ids) for each in changed]


def test_greedy_tokens_equal_transformers(observed):
    assert [ids for ids, _, _ in observed["greedy"]] == observed["transformers greedy"]
    assert {(reason, version) for _, reason, version in observed["greedy"]} == {("length", 1)}


def test_log_probs_equal_transformers_at_the_sampling_temperature(observed):
    # fp32 on both sides: rounding of 4 layers and a softmax; 2e-6 was measured.
    assert observed["greedy log-prob error"] < 1e-5
    assert observed["log-prob error at 1.0"] < 1e-5
    assert observed["log-prob error at 0.7"] < 1e-5


def test_a_stop_token_ends_a_response_and_belongs_to_it(observed):
    stop, ids, num_log_probs, reason = observed["stopped"]
    expected = observed["transformers greedy"][0]
    assert ids == expected[: expected.index(stop) + 1]
    assert (num_log_probs, reason) == (len(ids), "stop")


def test_streamed_prompts_get_the_same_answers(observed):
    assert observed["streamed"] == observed["transformers greedy"] * 3


def test_what_the_engine_would_not_honour_is_refused(observed):
    messages = {
        "stop string": "stop_token_ids",
        "too long": "more than the 512",
        "empty": "prompt 0 is empty",
        "top_p": "top_p = 0.0",
    }
    for name, message in messages.items():
        kind, text = observed["refused"][name]
        assert kind == "ValueError"
        assert message in text
    assert observed["longest"] == 12


def test_generation_needs_an_update_first(observed):
    kind, text, _ = observed["before the first update"]
    assert (kind, "update_weights" in text) == ("EngineError", True)


def test_an_update_is_reported(observed):
    report = observed["report"]
    assert report.weight_version == 1
    assert report.bytes > 600_000
    assert report.ops > 40
    assert 0 < report.pull_s < report.call_s


def test_a_pull_restores_every_poisoned_byte(observed):
    assert all(observed["poison shows"])
    assert observed["restored"]
    assert observed["generation of poison"][0] == "EngineError"


def test_an_update_brings_the_trainers_current_weights(observed):
    engine, transformers, error = observed["after a step"]
    assert engine == transformers
    assert engine != observed["transformers greedy"]
    assert error < 1e-5
    assert observed["version after a step"] == (3, 3)


def test_samples_repeat_from_an_update_on(observed):
    first, second, repeated = observed["samples"]
    assert first == repeated
    assert first != second


def test_a_failing_loader_rank_is_named_and_the_engine_stays_usable(observed):
    kind, text, seconds = observed["failed update"]
    assert kind == "EngineError"
    assert f"engine rank {observed['tp_size'] - 1}: RuntimeError: asked to fail" in text
    assert ("engine rank 0" in text) == (observed["tp_size"] == 1)
    assert seconds < 5
    assert "last weight update failed" in observed["generation after it"][1]
    assert observed["after repair"]


def test_sources_that_do_not_fit_are_refused_with_the_reason(observed):
    assert "float32" in observed["wrong dtype"][1]
    assert "bfloat16" in observed["wrong dtype"][1]
    assert observed["missing stage"][0] == "EngineError"
    assert "model.layers.2" in observed["missing stage"][1]


def test_the_trainer_keeps_its_signals_environment_and_disk(observed):
    before, changed = observed["signals while running"]
    assert "note_child_failure" in changed["SIGQUIT"]
    assert changed | {"SIGQUIT": ""} == before | {"SIGQUIT": ""}
    assert observed["changed while running"] == ["children", "signals", "threads"]


def test_shutdown_leaves_nothing_behind(observed):
    assert observed["left behind"] == {}
    assert observed["after shutdown"][0] == "EngineError"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_killed_scheduler_is_an_error_and_a_restart_brings_the_engine_back(model_folder, tp_size):
    def job():
        before = jobs.surroundings()
        trained = jobs.TrainedEngine(model_folder, tp_size=tp_size)
        engine, stop = trained.engine, jobs.greedy(trained.model, 100)
        short = next(token for token in stop[0] if token not in stop[1])
        asked: list[int] = []

        def take(free: int) -> list[tuple[int, list[int]]]:
            # The second call comes when a slot is free again: the first prompt is answered, the others never will be.
            if asked:
                jobs.kill_last_scheduler(engine, tp_size)
            taken = [(2, jobs.PROMPTS[2])] if asked else list(enumerate(jobs.PROMPTS[:2]))
            asked.append(free)
            return taken

        params = SamplingParams(max_new_tokens=100, temperature=0.0, stop_token_ids=(short,))
        begin = time.perf_counter()
        with pytest.raises(EngineDiedError) as died:
            engine.generate_from(take, params, window=2)
        died_s = time.perf_counter() - begin
        afterwards = jobs.error_of(lambda: engine.generate(jobs.PROMPTS, jobs.sampling(1)))
        engine.release_memory(["kv_cache"])
        begin = time.perf_counter()
        engine.restart()
        restart_s = time.perf_counter() - begin
        unready = jobs.error_of(lambda: engine.generate(jobs.PROMPTS, jobs.sampling(1)))
        trained.update()
        answers = [
            list(each.response_ids) for each in engine.generate(jobs.PROMPTS, jobs.sampling(GREEDY, temperature=0.0))
        ]
        engine.shutdown()
        left = jobs.differences(before, jobs.surroundings())
        finished = {index: list(each.response_ids) for index, each in died.value.finished.items()}
        assert finished == {0: stop[0][: stop[0].index(short) + 1]}
        assert answers == [tokens[:GREEDY] for tokens in stop]
        return str(died.value), afterwards, unready, (died_s, restart_s), left

    died, afterwards, unready, (died_s, restart_s), left = jobs.in_own_process(job)
    assert (afterwards[0], unready[0]) == ("EngineDiedError", "EngineError")
    assert "died during generate" in died
    assert "exit code -9" in died
    assert "no weights have been loaded" in unready[1]
    assert died_s < 20
    assert restart_s < 20
    assert left == {}


def test_a_scheduler_that_raises_tells_why(model_folder):
    def job():
        trained = jobs.TrainedEngine(model_folder, tp_size=2)
        trained.engine.poison_weights()
        trained.engine._weights.invalid = None  # let it sample from NaN
        try:
            return jobs.error_of(lambda: trained.engine.generate(jobs.PROMPTS, jobs.sampling(8)))
        finally:
            trained.engine.shutdown()

    kind, text, seconds = jobs.in_own_process(job)
    assert kind == "EngineDiedError"
    assert "probability tensor contains either `inf`, `nan`" in text
    assert seconds < 5


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, "SystemExit"), (signal.SIGINT, "KeyboardInterrupt")])
def test_signals_interrupt_generation(model_folder, number, error):
    def job():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trained = jobs.TrainedEngine(model_folder, tp_size=1)
        sender = jobs.after(0.5, lambda: os.kill(os.getpid(), number))
        stopped = jobs.error_of(lambda: trained.engine.generate(jobs.PROMPTS, jobs.sampling(480)))
        sender.join()
        trained.engine.shutdown()
        return stopped[0], stopped[2]

    kind, seconds = jobs.in_own_process(job)
    assert kind == error
    assert seconds < 30


def test_failed_starts_say_why_and_leave_nothing(model_folder, tmp_path):
    def broken(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        text = (model_folder / "config.json").read_text()
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        (folder / "config.json").write_text(text)
        return folder

    unknown = broken("unknown", architecture=("LlamaForCausalLM", "NoSuchForCausalLM"))
    odd_heads = broken("odd", heads=('"num_key_value_heads": 4', '"num_key_value_heads": 3'))

    def fail_while_starting() -> None:
        raise KeyError("the trainer's own set-up")

    def job():
        before = jobs.surroundings()
        errors = {
            "no folder": jobs.error_of(lambda: jobs.start(tmp_path / "absent", tp_size=1)),
            "unknown model": jobs.error_of(lambda: jobs.start(unknown, tp_size=1)),
            "kv heads": jobs.error_of(lambda: jobs.start(odd_heads, tp_size=2)),
            "deadline": jobs.error_of(lambda: jobs.start(model_folder, tp_size=2, start_timeout_s=0.01)),
            "in the child": jobs.error_of(lambda: jobs.start(model_folder, tp_size=1, max_total_tokens=1)),
            "own set-up": jobs.error_of(lambda: jobs.start(model_folder, tp_size=1, during_start=fail_while_starting)),
        }
        return errors, jobs.differences(before, jobs.surroundings())

    errors, left = jobs.in_own_process(job)
    expected = {
        "no folder": ("ValueError", "config.json does not exist"),
        "unknown model": ("EngineError", "NoSuchForCausalLM"),
        "kv heads": ("ValueError", "num_key_value_heads = 3"),
        "deadline": ("EngineError", "not ready within"),
        "in the child": ("EngineError", "Traceback"),
        "own set-up": ("KeyError", "the trainer's own set-up"),
    }
    for name, (kind, text) in expected.items():
        assert errors[name][0] == kind, errors[name]
        assert text in errors[name][1]
        assert errors[name][2] < 20
    assert left == {}


def test_an_assert_of_the_schedulers_update_manager_is_a_failure(model_folder):
    def refuse(manager, request):
        raise AssertionError("Cache flush failed")

    def main(env: RankEnvironment):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=240))
        answer = hooks.fail_instead_of_assert(refuse, SimpleNamespace(tp_cpu_group=dist.group.WORLD), None)
        dist.destroy_process_group()
        return answer.success, json.loads(answer.message)[0][1]["error"]

    assert run_ranks(main, 2, timeout_s=240) == [(False, "AssertionError: Cache flush failed")] * 2


def test_a_call_past_its_deadline_is_an_error(model_folder):
    def job():
        trained = jobs.TrainedEngine(model_folder, tp_size=1, call_timeout_s=5.0)
        trained.engine._supervisor._call_timeout_s = 0.3
        late = jobs.error_of(lambda: trained.engine.generate(jobs.PROMPTS, jobs.sampling(480)))
        trained.engine.shutdown()
        return late

    kind, text, seconds = jobs.in_own_process(job)
    assert kind == "EngineDiedError"
    assert "generate took longer than 0 s" in text
    assert seconds < 30


def test_a_long_generation_in_which_responses_come_is_no_late_call(model_folder):
    def job():
        trained = jobs.TrainedEngine(model_folder, tp_size=1)
        trained.engine.generate(jobs.PROMPTS, jobs.sampling(4))
        trained.engine._supervisor._call_timeout_s = 2.0
        waiting = [(number, jobs.PROMPTS[0]) for number in range(400)]

        def take(count):
            taken, waiting[:] = waiting[:count], waiting[count:]
            return taken

        begin = time.monotonic()
        answers = trained.engine.generate_from(take, jobs.sampling(8), window=1)
        seconds = time.monotonic() - begin
        trained.engine.shutdown()
        return len(answers), seconds

    count, seconds = jobs.in_own_process(job)
    assert count == 400
    assert seconds > 2.5, "too fast to say anything"


@pytest.mark.parametrize("tp_sizes", [{0: 2}, {0: 1, 1: 1}], ids=["one tp2", "two tp1"])
def test_every_rank_gets_the_samples_of_all_engines(model_folder, tp_sizes):
    prompts = [
        Prompt(uid=str(i), token_ids=ids, messages=[], data_source="x") for i, ids in enumerate(jobs.PROMPTS * 2)
    ]

    def main(env: RankEnvironment):
        engine = jobs.start(model_folder, tp_size=tp_sizes[env.rank]) if env.rank in tp_sizes else None
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=240))
        spec = load_spec(model_folder)
        model = jobs.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        trainer = jobs.export_trainer(spec, model, pp=1)
        rollout = ColocatedRollout(engine, spec=spec, source=trainer.sources[env.rank], weight_version=4)
        metrics = rollout.update_weights()
        samples = rollout.generate(prompts, jobs.sampling(GREEDY, temperature=0.0))
        dist.barrier()
        rollout.close()
        dist.destroy_process_group()
        answers = [
            (each.prompt.uid, list(each.generation.response_ids), each.generation.weight_version) for each in samples
        ]
        return metrics["reshard/bytes"], answers

    def expected():
        trained = jobs.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        return jobs.greedy(trained, GREEDY)

    rows = jobs.in_own_process(expected) * 2
    for num_bytes, answers in run_ranks(main, 2, timeout_s=240):
        assert answers == [(str(index), row, 4) for index, row in enumerate(rows)]
        assert num_bytes > 600_000 * len(tp_sizes)


def test_engines_on_gpus_start_on_hosts_of_several_numa_nodes(monkeypatch):
    """SGLang would put numactl in front of the interpreter, and insists on a start method that ranks do not have."""
    preload_sglang()
    from sglang.srt.utils import numa_utils

    monkeypatch.setattr(numa_utils, "get_numa_node_if_available", lambda *_: 0)
    monkeypatch.setattr(numa_utils, "_numactl_cpu_mem_args", lambda *_: "--cpunodebind=0")
    monkeypatch.setattr(numa_utils, "_probe_numactl_args", lambda args: (args, ""))
    monkeypatch.setattr(numa_utils, "_create_numactl_executable", lambda **_: ("numactl", ""))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    with pytest.raises(AssertionError, match="fork"), numa_utils.configure_subprocess(None, 0):
        pass
    for name, value in child_environment("cuda", 2).items():
        monkeypatch.setenv(name, value)
    with numa_utils.configure_subprocess(None, 0):
        pass


def test_captured_experts_leave_the_buffer_that_the_next_batch_is_written_to():
    buffer, places = torch.arange(6).view(3, 2), torch.arange(3)
    output = SimpleNamespace(topk=buffer[:2], out_cache_loc=places)
    assert hooks.keep_what_was_captured(lambda *_, **__: output, "capturer") is output
    buffer.zero_()
    places.zero_()
    assert output.topk.tolist() == [[0, 1], [2, 3]]
    assert output.out_cache_loc.tolist() == [0, 1, 2]
    assert hooks.keep_what_was_captured(lambda: None) is None


@pytest.mark.parametrize("reports", [True, False])
def test_routers_learn_their_layers_where_experts_are_reported(reports):
    class Block(torch.nn.Module):
        def __init__(self, experts: torch.nn.Module) -> None:
            super().__init__()
            self.topk = torch.nn.Identity()
            self.topk.layer_id = None
            self.experts = experts

    fused = torch.nn.Identity()
    fused.layer_id = 5
    # Some models have their experts one by one; these do not report any.
    block = Block(fused if reports else torch.nn.ModuleList())
    runner = SimpleNamespace(
        model=torch.nn.Sequential(block), server_args=SimpleNamespace(enable_return_routed_experts=reports)
    )
    called = []
    hooks.capture_every_layer(called.append, runner)
    assert called == [runner]
    assert block.topk.layer_id == (5 if reports else None)
