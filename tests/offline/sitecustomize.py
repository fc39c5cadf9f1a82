"""Cuts the network, loopback apart, in every Python process that finds this folder on PYTHONPATH.

Python imports `sitecustomize` by itself when it starts, so children and grandchildren of the tests (launchers, ranks,
data workers) are cut too. An audit hook sees every socket call of the interpreter and cannot be taken off again.
"""

import os
import socket
import sys
from typing import Any

_MARK = "_pixellm_network_is_cut"


class NetworkIsCut(OSError):
    """A test process tried to reach another machine. An OSError, so that libraries see the outage it imitates."""


def is_local(host: Any) -> bool:
    """True for loopback addresses, this machine's own name, and what is no address at all (None, "")."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str):
        return True  # None, and families whose addresses are numbers (netlink)
    host = host.split("%")[0].lower()
    if host in {"", "localhost", "::", "::1", "0.0.0.0", socket.gethostname().lower()}:
        return True
    return host.startswith(("127.", "::ffff:127."))


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        address = args[1]
        host = address[0] if isinstance(address, tuple) and address else None  # unix sockets have a path instead
    elif event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}:
        host = args[0]
    else:
        return
    if not is_local(host):
        raise NetworkIsCut(f"{event}: {host!r} is not this machine, and tests run without network")


def cut_network() -> None:
    """Cut it in this process (once), and tell libraries that ask first or whose sockets Python does not see."""
    if not getattr(sys, _MARK, False):
        setattr(sys, _MARK, True)
        sys.addaudithook(_refuse)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        PIP_NO_INDEX="1",
        http_proxy="http://127.0.0.1:9",  # nothing listens there: programs that are not Python meet a closed door
        https_proxy="http://127.0.0.1:9",
        HTTP_PROXY="http://127.0.0.1:9",
        HTTPS_PROXY="http://127.0.0.1:9",
        no_proxy="localhost,127.0.0.1,::1",
        NO_PROXY="localhost,127.0.0.1,::1",
    )


cut_network()
