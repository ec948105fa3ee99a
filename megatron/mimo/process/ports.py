"""A free port for a job on this host, which nobody else is given until the job listens on it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

__all__ = ["held_port"]


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port of this host that the system gives to no other program inside of the context.

    A port that was only looked up may be another's by the time that it is used: each process group
    of gloo takes ports of its own. Who asks for this one by its number gets it, as torch's store
    does (``MASTER_PORT``), in this process or in another.

    Yields:
        Its number.
    """
    with socket.socket() as holder:  # is bound, and does not listen
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("localhost", 0))
        yield holder.getsockname()[1]
