"""gunicorn's settings: threads, since a watcher holds one while it waits and nothing here computes for long."""

from __future__ import annotations

from tasks.errors import ConfigurationError
from tasks.settings import settings

try:
    _gateway = settings().gateway
except ConfigurationError as error:
    raise SystemExit(f"error: {error.detail}\nhint: {error.hint}") from None

bind = f"{_gateway.host}:{_gateway.port}"
worker_class = "gthread"
workers = 1
threads = _gateway.threads
keepalive = 65
graceful_timeout = 20
# A thread that streams for an hour is healthy: this is about the worker process's own heartbeat.
timeout = 60
control_socket_disable = True
accesslog = "-"
# The path alone: a query string is the client's text.
access_log_format = '%(t)s "%(m)s %(U)s" %(s)s %(B)sB %(M)sms'
