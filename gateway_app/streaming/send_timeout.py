"""How long a client may take nothing of what waits for it, or leave open a connection that it has everything of."""

from __future__ import annotations

import asyncio

#: How long a client may take nothing of what waits for it.
STALL_S = 30.0
#: How long a client that has been given everything may take to close its connection.
LINGER_S = 2.0


class SendTimeout:
    """The timeout of one connection. All of it is for the loop's thread."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        """Tell whether progress is expected, or did not come."""
        return self._timer is not None

    def expect_progress(self, transport: asyncio.Transport) -> None:
        """Cut the client off if it takes nothing more of what waits for it, or does not close when it has it all."""
        self.cancel()
        held = transport.get_write_buffer_size()
        after_s = STALL_S if held else LINGER_S
        self._timer = asyncio.get_running_loop().call_later(after_s, self._check_progress, transport, held)

    def cancel(self) -> None:
        """Expect nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_progress(self, transport: asyncio.Transport, held: int) -> None:
        if transport.get_write_buffer_size() < held:
            self.expect_progress(transport)
        else:
            transport.abort()
