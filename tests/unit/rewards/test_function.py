import os
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from mrl.interfaces import RewardError
from mrl.rewards.function import FunctionReward
from mrl.rewards.part import RewardPart
from mrl.rewards.weighted import FAILED_KEY, WeightedReward
from mrl.types import Generation, Prompt, Sample


def build_reward_fn(*, on_failure="raise", **arguments):
    """A reward of one unnamed part; its function is loaded."""
    scorer = FunctionReward(**arguments)
    reward = WeightedReward([RewardPart(name="", scorer=scorer, on_failure=on_failure)])
    try:
        scorer.check_function()
    except ValueError:
        reward.close()
        raise
    return reward


def make_sample(text="4", *, uid="train.parquet:7", data_source="sums", ground_truth="4", extra_info=None):
    prompt = Prompt(
        uid=uid,
        token_ids=[1],
        messages=[],
        data_source=data_source,
        ground_truth=ground_truth,
        extra_info=extra_info or {},
    )
    generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
    return Sample(prompt=prompt, generation=generation, response_text=text)


@pytest.fixture
def write_function(tmp_path):
    def write(source, name="reward.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


def running_children():
    return {child for child in psutil.Process().children(recursive=True) if is_running(child)}


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def worker_processes():
    """The children started since the test began; another test's are no business of these."""
    others = running_children()
    return lambda: running_children() - others


EQUALITY = """
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
        return {"score": scale * (solution_str == ground_truth), "length": len(solution_str), "note": data_source}
"""

OBEDIENT = """
    import os, time
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return eval(solution_str)
"""


def test_function_from_a_file_scores_in_order_with_its_numeric_parts(write_function):
    with build_reward_fn(path=write_function(EQUALITY), kwargs={"scale": 0.5}, num_workers=2) as reward:
        scored = reward([make_sample("4"), make_sample("52"), make_sample("4")])
    assert scored == [(0.5, {"length": 1.0}), (0.0, {"length": 2.0}), (0.5, {"length": 1.0})]


def test_function_is_found_by_its_name(write_function):
    path = write_function("def judge(data_source, solution_str, ground_truth, extra_info=None): return extra_info['x']")
    with build_reward_fn(path=path, name="judge", num_workers=1) as reward:
        assert reward([make_sample(extra_info={"x": 3})]) == [(3.0, {})]


def test_no_samples_give_no_rewards(write_function):
    with build_reward_fn(path=write_function(EQUALITY), num_workers=1) as reward:
        assert reward([]) == []


def test_samples_are_scored_concurrently(write_function, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    path = write_function(
        f"""
        import pathlib, time
        def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            meeting = pathlib.Path({str(meeting)!r})
            (meeting / solution_str).touch()
            while len(list(meeting.iterdir())) < 4:
                time.sleep(0.01)
            return 1
        """
    )
    with build_reward_fn(path=path, num_workers=4, timeout_s=60) as reward:
        assert reward([make_sample(str(index)) for index in range(4)]) == [(1.0, {})] * 4


def test_coroutine_functions_run_at_once_in_one_worker(write_function):
    path = write_function(
        """
        import asyncio
        all_here, here = asyncio.Event(), []
        async def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            here.append(solution_str)
            if len(here) == 20:
                all_here.set()
            await all_here.wait()
            return float(solution_str)
        """
    )
    with build_reward_fn(path=path, num_workers=1, timeout_s=60) as reward:
        assert reward([make_sample(str(index)) for index in range(20)]) == [(float(index), {}) for index in range(20)]


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero .*:"),
        ("float('nan')", "returned nan, which is not a finite number"),
        ("float('inf')", "returned inf, which is not a finite number"),
        ("{'score': float('nan')}", "not a finite number"),
        ("'1.0'", "returned '1.0', which is neither a number"),
        ("None", "returned None, which is neither a number"),
        ("{'points': 1}", "a mapping without 'score'"),
        ("os._exit(3)", r"died \(exit status 3\)"),
        ("time.sleep(60)", "took longer than its time limit of 2 s"),
        ("'a' * 30 and __import__('re').match('(a+)+b', 'a' * 40)", "took longer than its time limit of 2 s"),
    ],
)
def test_a_failing_sample_ends_the_run_naming_it(write_function, expression, complaint):
    timeout_s = 2 if "time limit" in complaint else 60
    with build_reward_fn(path=write_function(OBEDIENT), num_workers=2, timeout_s=timeout_s) as reward:
        samples = [make_sample("1"), make_sample(expression, uid="val.parquet:3"), make_sample("0")]
        with pytest.raises(RewardError, match=rf"'val.parquet:3' \(data_source 'sums'\) .*{complaint}"):
            reward(samples)
        assert reward([make_sample("1")]) == [(1.0, {})], "the pool has to stay usable"


def test_failures_score_zero_and_are_counted_if_asked(write_function, caplog):
    with build_reward_fn(path=write_function(OBEDIENT), num_workers=2, timeout_s=2, on_failure="zero") as reward:
        texts = ("1", "1 / 0", "time.sleep(60)", "os._exit(1)")
        scored = reward([make_sample(text) for text in texts])
    assert scored == [(1.0, {FAILED_KEY: 0.0}), *[(0.0, {FAILED_KEY: 1.0})] * 3]
    assert "3 of 4 samples could not be scored" in caplog.text


def test_a_coroutine_past_its_time_limit_fails_alone(write_function):
    path = write_function(
        """
        import asyncio
        async def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            await asyncio.sleep(float(solution_str))
            return 1
        """
    )
    with build_reward_fn(path=path, num_workers=1, timeout_s=2, on_failure="zero") as reward:
        assert [score for score, _ in reward([make_sample("0"), make_sample("30"), make_sample("0.1")])] == [1, 0, 1]


def test_first_failure_does_not_wait_for_the_other_samples(write_function):
    with build_reward_fn(path=write_function(OBEDIENT), num_workers=2, timeout_s=30) as reward:
        reward([make_sample("1")] * 2)
        start = time.monotonic()
        with pytest.raises(RewardError):
            reward([make_sample("1 / 0"), *[make_sample("time.sleep(5)")] * 20])
    # Waiting for all of them would take 50 s.
    assert time.monotonic() - start < 25


def test_close_ends_workers_at_work_and_what_they_started(write_function, worker_processes):
    source = """
        import subprocess
        def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            return subprocess.run(["sleep", "86.4"]).returncode
    """
    reward = build_reward_fn(path=write_function(source), num_workers=1, timeout_s=1)
    with pytest.raises(RewardError, match="time limit"):
        reward([make_sample()])
    reward.close()
    reward.close()
    assert worker_processes() == set()
    # Killed, it may take the system a moment to be gone.
    deadline = time.monotonic() + 60
    while [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "86.4"]]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_die_with_a_killed_parent_even_when_they_hang(write_function, tmp_path):
    function = write_function(
        """
        import os, re
        def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            open(solution_str, "w").write(str(os.getpid()))
            re.match("(a+)+b", "a" * 60)
        """
    )
    program = tmp_path / "program.py"
    program.write_text(
        "from mrl.rewards.messages import Item\n"
        "from mrl.rewards.pool import Limits, WorkerPool\n"
        "from mrl.rewards.worker import FunctionSpec\n"
        f"pool = WorkerPool(FunctionSpec(path={function!r}), Limits(timeout_s=300), num_workers=1)\n"
        f"pool.score([Item('s', {str(tmp_path / 'pid')!r}, '', {{}})], stop_at_failure=True)\n"
    )
    parent = subprocess.Popen([sys.executable, program])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    worker.wait(timeout=30)


def test_a_forked_child_scores_with_workers_of_its_own(write_function, worker_processes):
    with build_reward_fn(path=write_function(EQUALITY), num_workers=1) as reward:
        before = worker_processes()
        child = os.fork()
        if child == 0:
            correct = reward([make_sample("4")]) == [(1.0, {"length": 1.0})]
            reward.close()
            os._exit(0 if correct else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert worker_processes() == before
        assert reward([make_sample("4")]) == [(1.0, {"length": 1.0})]


@pytest.mark.parametrize(
    ("source", "name", "complaint"),
    [
        ("def other(): pass", "compute_score", r"no function 'compute_score'; its functions are \['other'\]"),
        ("import no_such_package", "compute_score", "does not import: .*no_such_package"),
        ("def broken(:", "compute_score", "does not import: .*SyntaxError"),
        ("import os; os._exit(7)", "compute_score", "exit status 7"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(write_function, worker_processes, source, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        build_reward_fn(path=write_function(source), name=name)
    assert worker_processes() == set()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone.py does not exist"):
        build_reward_fn(path=str(tmp_path / "gone.py"))


@pytest.mark.parametrize(
    "arguments", [{"num_workers": 0}, {"timeout_s": 0}, {"timeout_s": float("nan")}, {"on_failure": "ignore"}]
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        build_reward_fn(**arguments)


def test_built_in_verifiers_are_chosen_by_data_source():
    samples = [
        make_sample("6789", data_source="embedded/counting", ground_truth="6789"),
        make_sample("so #### 72", data_source="openai/gsm8k", ground_truth="72"),
    ]
    with build_reward_fn(num_workers=1) as reward:
        assert reward(samples) == [(1.0, {}), (1.0, {})]


def test_importing_a_verifier_s_library_does_not_count_against_a_sample():
    entry = '{"answer": "4", "metadata": {"difficulty": {}}}'
    sample = make_sample("<answer>4</answer>", data_source="reasoning_gym/leg_counting", extra_info={"entry": entry})
    with build_reward_fn(num_workers=1, timeout_s=1) as reward:
        assert reward([sample]) == [(1.0, {})]


def test_unknown_data_source_names_the_known_ones():
    known = r"'sums'; known: embedded/counting, openai/gsm8k, reasoning_gym"
    with build_reward_fn(num_workers=1) as reward, pytest.raises(ValueError, match=known):
        reward([make_sample()])
    with build_reward_fn(num_workers=1, kwargs={"verifiers": {"sums": "exact_match"}}) as reward:
        assert reward([make_sample("4"), make_sample("5")]) == [(1.0, {}), (0.0, {})]
