"""What waits for the device in passes of a model that has none."""

from __future__ import annotations

import sys

from megatron.mimo.backend.host_sync import HostSyncCounter

_FRAMES = 12


class DeviceWaits(HostSyncCounter):
    """Leaves out the state of the CPU's generator, which Megatron compares in ``fork``: it is on
    the host with a GPU too."""

    def note(self, wait: str) -> None:
        if not _in_fork():
            super().note(wait)


def _in_fork() -> bool:
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        code = frame.f_code
        if code.co_name == "fork" and code.co_filename.endswith("tensor_parallel/random.py"):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
