"""Set before torch is imported: what the launcher's preload sets before it forks ranks on a CPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from namespaces import Hosts, Unavailable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture
def make_hosts(tmp_path) -> Iterator[Callable[..., Hosts]]:
    """Hosts on this machine, gone after the test; skips it where nobody may make them."""
    with ExitStack() as stack:

        def make(count: int, **kwargs: bool) -> Hosts:
            try:
                return stack.enter_context(Hosts(count, tmp_path, **kwargs))
            except Unavailable as reason:
                pytest.skip(f"no hosts on this machine: {reason}")

        yield make
