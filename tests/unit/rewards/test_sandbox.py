"""What reward workers know and reach, with and without the sandbox."""

import os
import socket
import textwrap

import pytest

from mrl.rewards.function import FunctionReward
from mrl.rewards.sandbox import check_permitted, clean_environment
from mrl.types import Generation, Prompt, Sample

CALL = """
    import os, signal, socket, subprocess, sys
    def connect(family, address):
        with socket.socket(family) as client:
            client.settimeout(20)
            client.connect(address)
        return 1.0
    def program(source):
        return float(subprocess.run([sys.executable, "-c", source]).returncode)
    def refused():
        from mrl.rewards.sandbox import check_permitted
        try:
            check_permitted()
        except ValueError as error:
            return float("reward.sandbox = True, but this host does not permit it" in str(error))
        return 0.0
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        try:
            return eval(solution_str)
        except OSError:
            return 0.0
"""


@pytest.fixture
def score(tmp_path):
    """Evaluates an expression in a reward worker; 0 for one that the system refuses."""
    path = tmp_path / "reward.py"
    path.write_text(textwrap.dedent(CALL))
    rewards = []

    def evaluate(expression, **arguments):
        reward = FunctionReward(path=str(path), num_workers=1, **arguments)
        rewards.append(reward)
        prompt = Prompt(uid="x:0", token_ids=[1], messages=[], data_source="s", ground_truth="", extra_info={})
        generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
        sample = Sample(prompt=prompt, generation=generation, response_text=expression)
        [outcome] = reward.score([sample], stop_at_failure=True)
        assert outcome.error is None, outcome.error
        return outcome.score

    yield evaluate
    for reward in rewards:
        reward.close()


@pytest.fixture
def sandbox():
    try:
        check_permitted()
    except ValueError as error:
        pytest.skip(str(error))


def test_the_job_s_port_is_out_of_a_sandboxed_function_s_reach(score, sandbox):
    with socket.create_server(("127.0.0.1", 0)) as store:
        call = f"connect(socket.AF_INET, ('127.0.0.1', {store.getsockname()[1]}))"
        assert score(call) == 1.0
        assert score(call, sandbox=True) == 0.0


def test_a_socket_in_the_file_system_is_out_of_reach(score, sandbox, tmp_path):
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(str(tmp_path / "raylet"))
        raylet.listen()
        call = f"connect(socket.AF_UNIX, {str(tmp_path / 'raylet')!r})"
        assert score(call) == 1.0
        assert score(call, sandbox=True) == 0.0


def test_programs_that_a_sandboxed_function_starts_are_in_the_sandbox_too(score, sandbox):
    call = (
        "program(\"import socket, sys\\ntry: socket.socket(socket.AF_UNIX).connect('/nowhere')\\n"
        'except PermissionError: sys.exit(7)")'
    )
    assert score(call, sandbox=True) == 7.0


def test_other_processes_are_not_visible(score, sandbox):
    call = f"float(os.path.exists('/proc/{os.getpid()}/environ'))"
    assert score(call) == 1.0
    assert score(call, sandbox=True) == 0.0
    assert score("float(len([name for name in os.listdir('/proc') if name.isdigit()]))", sandbox=True) == 1.0


def test_workers_do_not_inherit_secrets_addresses_or_descriptors(score, monkeypatch):
    for name in ("WANDB_API_KEY", "MASTER_ADDR", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "x")
    withheld = "float(any(name in os.environ for name in ('WANDB_API_KEY', 'MASTER_ADDR', 'RAY_ADDRESS')))"
    assert score(withheld) == 0.0
    assert score("float('WANDB_API_KEY' in os.environ)", pass_environment=["WANDB_API_KEY"]) == 1.0
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(server.fileno(), True)
        sockets = (
            "float(sum(os.readlink(f'/proc/self/fd/{n}') == f'socket:[%d]' for n in os.listdir('/proc/self/fd') "
            "if os.path.exists(f'/proc/self/fd/{n}')))"
        )
        inode = os.fstat(server.fileno()).st_ino
        assert score(sockets % inode) == 0.0


def test_a_host_that_permits_no_sandbox_is_told_apart(score, sandbox):
    assert score("refused()", sandbox=True) == 1.0  # in a sandbox, which permits no other


def test_variables_of_the_cluster_and_secrets_are_withheld():
    withheld = (
        "HF_TOKEN OPENAI_API_KEY AWS_SECRET_ACCESS_KEY GOOGLE_APPLICATION_CREDENTIALS PGPASSWORD RAY_AUTH_TOKEN "
        "MASTER_PORT SLURM_JOB_ID RANK LOCAL_WORLD_SIZE MRL_HOST_ADDRESS SSH_AUTH_SOCK"
    )
    environ = dict.fromkeys(withheld.split(), "x")
    assert clean_environment(environ) == {}
    assert clean_environment(environ, keep=["HF_TOKEN", "RANK"]) == {"HF_TOKEN": "x", "RANK": "x"}


def test_other_variables_stay():
    names = ("PATH", "HOME", "PWD", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "HF_HOME", "XKB_KEYMAP")
    environ = dict.fromkeys(names, "x")
    assert clean_environment(environ) == environ
