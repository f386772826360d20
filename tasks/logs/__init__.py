"""What the processes say: one event a line, for a person or for a machine, and never a word of a prompt or an answer.

Every process calls `configure` once. Its own code logs through `get_logger`: an event in a few constant words, and what
belongs to it as key-value pairs. Libraries log through Python's `logging`; both end in the same chain of processors
(`rendering`), which adds the time, the request's id and the trace's, takes out what must not be there (`redaction`), and renders
the line. What ends a process by surprise is treated alike (`crashes`).
"""

from tasks.logs.configuring import configure, ensure
from tasks.logs.context import bind_request, bound_request
from tasks.logs.loggers import get_logger
from tasks.logs.rendering import make_formatter

__all__ = ["bind_request", "bound_request", "configure", "ensure", "get_logger", "make_formatter"]
