"""gunicorn's own lines, through the chain that all others go through, and a line for each request at little cost.

Its options do what they always do: `--access-logfile` and `--error-logfile` name files, `--log-level` says how much is shown, and
SIGUSR1 has files opened anew. `--access-logformat` has no effect.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from gunicorn.glogging import Logger

from gateway_app.access import ROUTE, TRACE_ID, AccessLog, Answered
from tasks import logs
from tasks.logs.rendering import chosen, is_terminal
from tasks.settings import settings


class GunicornLogger(Logger):
    """What gunicorn logs with."""

    #: Set by `setup`, which the base class's constructor calls.
    requests: AccessLog

    def setup(self, cfg: Any) -> None:
        """Arrange all logging of this process, and of the worker processes, which are forked from it."""
        super().setup(cfg)
        options = settings().logs
        form = chosen(options.format)
        logs.configure(options, level=self.loglevel)
        # Below that gunicorn shows each request's path, and its query.
        self.error_log.setLevel(max(self.loglevel, logging.INFO))
        for handler in self.error_log.handlers:
            handler.setFormatter(logs.make_formatter(form, colors=cfg.errorlog == "-" and is_terminal()))
        writing = [one for one in self.access_log.handlers if isinstance(one, logging.StreamHandler)]
        self.requests = AccessLog(writing if self.access_log_enabled else (), as_json=form == "json")

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:  # noqa: ARG002  gunicorn's
        """Log one request, at its end."""
        # Without a status the application failed before it answered, and gunicorn answers for it.
        status = int(str(resp.status or "500").partition(" ")[0])
        self.requests.write(
            Answered(
                environ.get("REQUEST_METHOD", ""),
                environ.get(ROUTE),
                status,
                request_time.total_seconds(),
                resp.sent,
                logs.bound_request(),
                environ.get(TRACE_ID),
            )
        )
        # The thread goes on with another request.
        logs.bind_request(None)
