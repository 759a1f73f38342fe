"""What the parts of a checkpoint's folder are called."""

from __future__ import annotations

ENGINE_STATE = "dist_ckpt"
"""Of each role: parameters, optimizer, learning-rate progress and random states."""
HUGGING_FACE = "huggingface"
"""Of each role: configuration, tokenizer and generation settings, with the weights if they are exported."""
LOOP_STATE = "trainer.json"
MANIFEST = "manifest.json"
LATEST = "latest"
"""Beside the checkpoints: the name of the newest one."""
