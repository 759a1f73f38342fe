"""A checkpoint's manifest: damage is noticed, what differs is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_specs import make_spec

from mrl.interfaces import CheckpointError
from mrl.parallel.layout import ParallelLayout
from mrl.trainer.manifest import (
    MANIFEST,
    Manifest,
    check_role,
    describe_role,
    list_files,
    read_manifest,
    record_files,
    verify_files,
    write_manifest,
)

SPEC = make_spec(
    vocab_size=10, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4
)


def record(spec=SPEC, *, tp=1, distributed=True, is_critic=False, dtype="float32"):
    layout = ParallelLayout(world_size=4, tp=tp)
    return describe_role(spec, layout, dtype=dtype, distributed_optimizer=distributed, is_critic=is_critic)


def write_checkpoint(folder):
    for name, data in {"actor/a.bin": b"weights", "critic/b.bin": b"", "trainer.json": b"{}"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files = record_files(folder, list_files(folder))
    manifest = Manifest(step=3, weight_version=2, roles={"actor": record()}, files=files)
    write_manifest(folder, manifest)
    return manifest


def test_a_manifest_reads_back_as_written(tmp_path):
    manifest = write_checkpoint(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert list(manifest.files) == ["actor/a.bin", "critic/b.bin", "trainer.json"]
    verify_files(tmp_path, manifest.files)


def test_a_changed_byte_of_the_manifest_is_noticed_or_changes_nothing(tmp_path):
    manifest = write_checkpoint(tmp_path)
    path = tmp_path / MANIFEST
    data = path.read_bytes()
    noticed = 0
    positions = range(0, len(data), 7)
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x15]) + data[position + 1 :])
        try:
            assert read_manifest(tmp_path) == manifest, position
        except CheckpointError:
            noticed += 1
    assert noticed > len(positions) / 2


def test_a_changed_cut_or_missing_file_is_named(tmp_path):
    manifest = write_checkpoint(tmp_path)
    path = tmp_path / "actor/a.bin"
    for damage in (lambda: path.write_bytes(b"weightz"), lambda: path.write_bytes(b"weight"), path.unlink):
        damage()
        with pytest.raises(CheckpointError, match=r"actor/a\.bin is damaged.*resume_from_path"):
            verify_files(tmp_path, manifest.files)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_manifest(tmp_path)


DIFFERENT = {
    "hidden size": (record(replace(SPEC, hidden_size=16)), r"actor tensor model\.embed_tokens\.weight is \[10, 16\]"),
    "fewer layers": (record(replace(SPEC, num_hidden_layers=2)), r"actor tensor model\.layers\.1\.\S+ is"),
    "precision": (record(dtype="bfloat16"), r"model\.embed_tokens\.weight is \[10, 8\] bfloat16 there"),
    "rope": (record(replace(SPEC, rope_theta=5e5)), r"actor model's rope_theta is 500000\.0 there and 10000\.0 here"),
    "optimizer": (record(distributed=False), r"use_distributed_optimizer is False there and True here"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_model_or_optimizer_is_refused_by_the_first_difference(tmp_path, case):
    saved, message = DIFFERENT[case]
    with pytest.raises(CheckpointError, match=message):
        check_role("actor", saved, record(), tmp_path)


def test_another_layout_and_a_longer_context_are_accepted(tmp_path):
    check_role("actor", record(tp=2), record(replace(SPEC, max_position_embeddings=128)), tmp_path)


def test_a_critics_record_has_a_value_head_instead_of_a_vocabulary_head():
    actor, critic = record().tensors, record(is_critic=True).tensors
    assert set(actor) - set(critic) == {"lm_head.weight"}
    assert critic["value_head.weight"]["shape"] == [1, 8]


def test_the_bytes_of_a_role_are_its_weights_and_the_optimizers_state():
    small = replace(record(), tensors={"a": {"shape": [3, 5], "dtype": "float32"}})
    assert small.num_bytes == 15 * 12
    assert replace(small, dtype="bfloat16").num_bytes == 15 * 14
