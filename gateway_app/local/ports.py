"""Finding TCP ports that are free on this machine."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from itertools import chain

from tasks.errors import ConfigurationError

#: How many ports after the usual one are tried, so that a second gateway is found near the first.
NEARBY = 20
#: Then these: below the range the kernel takes client ports from, where a client could take one before we do.
OTHERS = range(20_000, 20_400)


class PortTaken(ConfigurationError):
    """The port asked for is taken."""

    hint = "Choose another with METAQORE_GATEWAY__PORT, or leave it out: a free one is taken then."


def free_port(host: str, wanted: int, *, exactly: bool = False, promised: Collection[int] = ()) -> int:
    """Return `wanted` if it is free, else one near it, and none of those `promised` to others.

    Raises PortTaken if it must be that one, or none is free; ConfigurationError if the address is not this machine's.
    """
    if wanted not in promised and _is_free(host, wanted):
        return wanted
    if exactly:
        raise PortTaken(f"port {wanted} of {host} is taken by another program, and METAQORE_GATEWAY__PORT asks for it")
    for port in chain(range(wanted + 1, min(wanted + NEARBY, 65_536)), OTHERS):
        if port not in promised and _is_free(host, port):
            return port
    raise PortTaken(f"no port of {host} near {wanted} is free")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port whose last connections are still being closed counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Two sockets may be bound with SO_REUSEADDR as long as neither listens, so listening is what tells.
            probe.listen(1)
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ConfigurationError(f"gateway.host {host} is no address of this machine") from None
            if error.errno == errno.EACCES:
                raise ConfigurationError(f"port {port} may be used by root only; gateway.port names it") from None
            return False
        return True
