"""Reading ahead: order, memory, errors; files that keep their first error."""

from __future__ import annotations

import hashlib
import resource
import threading

import pytest
import torch

from mrl.convert.errors import DamageError
from mrl.convert.raw import DigestingFile, OpenFiles, read_matrix_box
from mrl.convert.streaming import read_ahead


def test_results_come_in_order_and_those_that_wait_stay_within_the_budget():
    sizes = [3, 4, 2, 9, 50, 1, 6, 4]
    lock, waiting, peak = threading.Lock(), 0, 0

    def make(size):
        nonlocal waiting, peak
        with lock:
            waiting += size
            peak = max(peak, waiting - (size if size > 10 else 0))
        return size

    results = []
    for size in read_ahead(((size, lambda size=size: make(size)) for size in sizes), budget_bytes=10):
        with lock:
            waiting -= size
        results.append(size)
    assert results == sizes
    assert peak <= 10


def test_an_error_is_raised_in_its_place_and_what_follows_is_not_made():
    made = []

    def make(number):
        made.append(number)
        if number == 2:
            raise DamageError("two")
        return number

    results = read_ahead(((4, lambda number=number: make(number)) for number in range(9)), budget_bytes=8)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DamageError, match="two"):
        next(results)
    assert max(made) <= 4


def test_a_box_is_read_from_within_a_file(tmp_path):
    matrix = torch.arange(7 * 5, dtype=torch.int32).view(7, 5)
    (tmp_path / "file").write_bytes(b"head" + matrix.numpy().tobytes())
    files = OpenFiles(tmp_path)
    target = torch.empty(4, 2, dtype=torch.int32)
    # Scratch for one row at a time.
    read_matrix_box(files, target, "file", 4, cols=5, row=2, col=3, scratch_bytes=20)
    assert torch.equal(target, matrix[2:6, 3:5])
    wide = torch.zeros(3, 9, dtype=torch.int32)
    read_matrix_box(files, wide[:, 2:7], "file", 4, cols=5, row=4, col=0)
    assert torch.equal(wide[:, 2:7], matrix[4:])
    with pytest.raises(DamageError, match=r"file ends at byte 144, but a tensor in it reaches to byte 164"):
        read_matrix_box(files, torch.empty(2, 5, dtype=torch.int32), "file", 4, cols=5, row=6, col=0)
    files.close()


def test_more_files_than_are_kept_open_can_be_read(tmp_path):
    for number in range(100):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    files = OpenFiles(tmp_path)
    assert [files.read_bytes(str(number), 0, 1)[0] for number in [*range(100), 0]] == [*range(100), 0]
    files.close()


def test_a_file_knows_its_checksum_and_keeps_the_systems_first_error(tmp_path):
    with DigestingFile(tmp_path / "whole", hashlib.sha256()) as file:
        file.write(b"ab")
        file.write(memoryview(b"cd"))
        assert (file.num_bytes, file.checksum()) == (4, hashlib.sha256(b"abcd").hexdigest())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, unlimited[1]))
    try:
        with DigestingFile(tmp_path / "full", hashlib.sha256()) as file:
            # As a writer in C++ sees it: all is well.
            assert file.write(b"abcd") == 4
            assert file.write(b"ef") == 2
            with pytest.raises(OSError, match="File too large"):
                file.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
