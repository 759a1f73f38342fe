"""A device's copies on CPU, made as late as possible."""

from __future__ import annotations

import torch


class LateCopier:
    """Copies between CPU tensors, made as late as a device might: when something waits for them.

    What is freed is gone at once for everybody but the copies that were given before, as with the device's allocator.
    A target that is used too early, or a source that is freed before its copy, shows in the values.
    """

    def __init__(self):
        self.queue = []
        self.log = []
        self.allocated = 0

    def allocate_host(self, num_bytes):
        self.allocated += num_bytes
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def begin_out(self):
        self.log.append("out")

    def copy_out(self, host, device):
        self.queue.append((host, device))
        self.log.append(device.numel())

    def free(self, storage):
        self.log.append("free")
        for place, (target, source) in enumerate(self.queue):
            if source.untyped_storage()._cdata == storage._cdata:
                self.queue[place] = (target, source.clone())
        storage.resize_(0)

    def end_out(self):
        return len(self.queue)

    def begin_in(self, departed):
        self.run()
        self.log.append("in")

    def copy_in(self, device, host):
        device.fill_(255)
        self.queue.append((device, host))
        self.log.append(device.numel())

    def end_in(self):
        return len(self.queue)

    def wait(self, arrived):
        self.run()

    def run(self):
        while self.queue:
            target, source = self.queue.pop(0)
            target.copy_(source)
