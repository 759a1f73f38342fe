"""Everything an engine needs, imported once in the process that will fork the ranks."""

from __future__ import annotations

import importlib
import logging
import os
import warnings

import torch

_MODULES = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "mrl.backends.sglang.engine",
    "mrl.backends.sglang.weight_loader",
)


def preload_sglang() -> None:
    """Import SGLang, its plugins and its model classes without starting a thread or touching a GPU.

    An engine forked from this process starts in about 1 s instead of half a minute. On CPU it also sets
    OMP_NUM_THREADS=1 and TORCHDYNAMO_DISABLE=1, where they are not set: SGLang reads them when it is imported.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # What goes wrong is raised; the rest is SGLang's remarks on hardware and models that are not used.
    logging.getLogger("sglang").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(name)
    from sglang.srt.plugins import load_plugins

    load_plugins()
