"""What an engine's child process leaves behind when it is killed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PARENT = """
import multiprocessing, os, signal
from tqdm import tqdm
from mrl.backends.sglang.children import LOG_VARIABLE, _detach

def child(path, detached):
    if detached:
        os.environ[LOG_VARIABLE] = path
        _detach()
    list(tqdm(range(3)))
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, args=({path!r}, {detached}))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
"""


@pytest.mark.parametrize(("detached", "leaks"), [(True, False), (False, True)])
def test_no_semaphore_is_left_of_a_progress_bar(tmp_path, detached, leaks):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=str(tmp_path / "child.log"), detached=detached))
    outcome = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert outcome.returncode == 0, outcome.stderr
    assert ("leaked semaphore" in outcome.stderr) == leaks
