"""Set before torch is imported: what the launcher's preload sets before it forks ranks on a CPU."""

import os

import pytest

pytest.register_assert_rewrite("fault_checks")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
