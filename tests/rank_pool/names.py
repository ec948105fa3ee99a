"""Names of addresses without a name server.

Each connection to torch's store asks for the name of the other side, 127.0.0.1 written as an IPv6
address, which no file has. A name server that leaves one such question in fifty unanswered makes
that run five seconds longer.
"""

from __future__ import annotations

from tests.rank_pool.libc import LIBC


def ask_no_name_server() -> None:
    """glibc: this process, and what it forks, looks for hosts in /etc/hosts alone."""
    configure = getattr(LIBC, "__nss_configure_lookup", None)
    if configure is not None:
        configure(b"hosts", b"files")
