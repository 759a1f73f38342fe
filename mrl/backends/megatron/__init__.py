"""Megatron-core behind `mrl.interfaces.TrainEngine`; the only package that imports megatron."""

from mrl.backends.megatron.cpu import prepare_megatron

# Before any module below imports megatron: the CPU names must be in place first.
prepare_megatron()
