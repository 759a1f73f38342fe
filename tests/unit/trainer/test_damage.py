"""Which tensor a damaged file belongs to. Checkpoints of torch's own writer, in the format that megatron-core uses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader

from mrl.interfaces import CheckpointError
from mrl.trainer.damage import verify_with_tensors
from mrl.trainer.manifest import list_files, record_files

STATE = {name: torch.randn(64, 64) for name in ("embedding", "layer.weight", "layer.bias", "head")}


@pytest.fixture
def saved(tmp_path):
    """The folder, its files' records, the name of the file with tensors, and where each lies in it."""
    checkpoint.save(STATE, checkpoint_id=tmp_path / "actor", no_dist=True)
    files = record_files(tmp_path, list_files(tmp_path))
    storage = FileSystemReader(tmp_path / "actor").read_metadata().storage_data
    places = {index.fqn: (place.offset, place.length) for index, place in storage.items()}
    (name,) = (name for name in files if name.endswith(".distcp"))
    assert set(places) == set(STATE)
    return tmp_path, files, name, places


def verify(saved):
    folder, files, _, _ = saved
    verify_with_tensors(folder, files, list(files))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("tensor", STATE)
def test_a_flipped_bit_of_a_tensor_is_named(saved, tensor):
    folder, _, name, places = saved
    verify(saved)
    offset, length = places[tensor]
    # The numbers take most of it: 16 KiB of a few hundred bytes more.
    flip(folder / name, offset + length // 2)
    with pytest.raises(CheckpointError, match=rf"tensor {tensor} .*{name} is damaged: its checksum differs"):
        verify(saved)


def test_of_several_damaged_tensors_the_first_in_the_file_is_named(saved):
    folder, _, name, places = saved
    first, second = sorted(places, key=places.get)[1:3]
    for tensor in (second, first):
        flip(folder / name, places[tensor][0] + places[tensor][1] // 2)
    with pytest.raises(CheckpointError, match=f"tensor {first} "):
        verify(saved)


def test_a_file_that_is_cut_short_lacks_the_tensor_at_the_cut(saved):
    folder, _, name, places = saved
    third = sorted(places, key=places.get)[2]
    path = folder / name
    path.write_bytes(path.read_bytes()[: places[third][0] + 100])
    with pytest.raises(CheckpointError, match=f"tensor {third} .*bytes instead of"):
        verify(saved)


def test_where_the_description_is_damaged_too_it_is_not_trusted(saved):
    folder, files, name, _ = saved
    flip(folder / name, 5000)
    flip(folder / "actor/.metadata", 10)
    with pytest.raises(CheckpointError, match=r"^checkpoint file \S+distcp is damaged"):
        verify_with_tensors(folder, files, [name])


def test_a_missing_file_is_named(saved):
    folder, _, name, _ = saved
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is damaged: No such file"):
        verify(saved)
