import logging

import pytest
import torch

from mrl import ops
from mrl.ops import extension, reference


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(extension, "_is_loaded", lambda: False)
    monkeypatch.setattr(extension, "_missing_for_build", lambda: "nvcc")
    extension.backend.cache_clear()
    yield
    extension.backend.cache_clear()


def test_a_host_without_a_compiler_falls_back_with_one_warning(without_compiler, caplog):
    source, target = torch.arange(32, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING, logger="mrl.ops"):
        tiles = ops.build_tiles(torch.tensor([[source.data_ptr(), 32, target.data_ptr(), 32, 1, 32]]))
        ops.batched_strided_copy_(target, tiles)
    assert torch.equal(source, target)
    assert extension.backend() is reference
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "need nvcc" in caplog.text


def test_what_is_built_is_not_built_again(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_compile", lambda library, with_cuda: library.write_text("built"))
    first = extension.build(with_cuda=False, folder=tmp_path)
    monkeypatch.setattr(extension, "_compile", lambda library, with_cuda: pytest.fail("compiled twice"))
    assert extension.build(with_cuda=False, folder=tmp_path) == first


def test_changed_sources_are_built_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_compile", lambda library, with_cuda: library.write_text("built"))
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(extension, "source_folder", lambda: tmp_path / "csrc")
    libraries = []
    for text in ("one", "two", "one"):
        (tmp_path / "csrc" / "op.cpp").write_text(text)
        libraries.append(extension.build(with_cuda=False, folder=tmp_path))
    assert libraries[0] == libraries[2] != libraries[1]


def test_every_op_has_a_reference_and_a_wrapper(compiled):
    for name in ops.__all__:
        assert callable(getattr(reference, name))
        assert getattr(compiled, name).default._schema.name == f"mrl::{name}"
