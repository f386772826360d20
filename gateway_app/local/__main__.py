"""Run the whole gateway on this machine, with nothing to set up; `bin/run` calls this.

The order: take the lock of this checkout, choose ports, make what is missing, then start Redis, the web server, a
housekeeper and a worker under a supervisor. A thread beside it waits for readiness, and shows the first curl or runs the demonstration.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from gateway_app.local import demo
from gateway_app.local.client import Client, RequestFailed
from gateway_app.local.environment import Environment, decide
from gateway_app.local.folder import Folder, write_holder
from gateway_app.local.preparation import prepare
from gateway_app.local.processes import end_all_stale
from gateway_app.local.progress import Progress
from gateway_app.local.readiness import wait_until_ready
from gateway_app.local.services import all_services
from gateway_app.local.supervisor import FAILED, Supervisor
from tasks.errors import GatewayError
from tasks.settings import Settings, settings

READY_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
INTERRUPTED = 128 + signal.SIGINT
WELCOME = """
The gateway is ready.

  tasks      {url}/v1/tasks
  readiness  {url}/readyz
  metrics    {metrics}
  logs       var/log/web.log, var/log/worker.log, var/log/housekeeper.log
  stop       Ctrl-C

In another terminal, in {root}:

  curl -s -H "Authorization: Bearer $(cat var/api-key)" -H 'Content-Type: application/json' \\
    -d '{{"agent":"{agent}","directive":"Name the most likely cause of the slow payments.","context":"{context}"}}' \\
    {url}/v1/tasks

It answers with an id; this shows the answer as it comes:

  curl -N -s -H "Authorization: Bearer $(cat var/api-key)" {url}/v1/tasks/ID/events

Before `flask` and `celery` commands there: set -a; . var/run/env; set +a; . .venv/bin/activate
"""


def main() -> int:
    """Run until told to stop. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bin/run",
        description="Set up and run the whole gateway on this machine: Redis, the web server, a housekeeper and a "
        "worker.",
        epilog="REDIS_URL and DATABASE_URL name services to use instead of the embedded ones; METAQORE_GATEWAY__PORT "
        "the port; METAQORE_ENGINE__KIND=simulated runs without a model. What is kept lies in var/.",
    )
    parser.add_argument("--once", action="store_true", help="send two tasks, show what happened, stop, and exit")
    arguments = parser.parse_args()
    progress = Progress()
    # SIGTERM ends the preparations as Ctrl-C does; the supervisor then takes both over.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(Folder(Path.cwd()), progress, once=arguments.once)
    except GatewayError as error:
        progress.clear()
        print(f"error: {error.detail}\nhint: {error.hint}", file=sys.stderr)
        return FAILED
    except OSError as error:
        progress.clear()
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        progress.say("interrupted")
        return INTERRUPTED


def _run(folder: Folder, progress: Progress, *, once: bool) -> int:
    folder.make()
    options = settings()
    with folder.lock() as lock:
        # Before ports are chosen, as they may hold the usual ones.
        for name in end_all_stale(folder.run, folder.root):
            progress.say(f"ended a {name} that an earlier start had left running")
        environment = decide(options, folder)
        write_holder(lock, environment.url)
        prepare(options, folder, progress, environment.database_url)
        # Again, since that may have taken minutes, and another gateway may have taken the ports.
        environment = decide(options, folder)
        write_holder(lock, environment.url)
        services = all_services(folder, environment, options.gateway.key_prefix, options.scheduling.drain_s)
        environment.write(folder)
        try:
            supervisor = Supervisor(services, folder, environment.for_children(os.environ), progress)
            return supervisor.run(
                lambda: _front(folder, environment, options, progress, lambda: supervisor.ending, once=once),
                interrupted=INTERRUPTED if once else 0,
            )
        finally:
            for name in ("env", "gateway.port", "redis.conf"):
                (folder.run / name).unlink(missing_ok=True)


def _front(
    folder: Folder,
    environment: Environment,
    options: Settings,
    progress: Progress,
    ending: Callable[[], bool],
    *,
    once: bool,
) -> int | None:
    """Wait, then welcome the user or run the demonstration. Returns an exit status to end everything with.

    Says nothing more once everything is `ending` for another reason.
    """
    progress.say(f"starting Redis, the web server, a housekeeper and a worker; {environment.url} once they are ready")
    client = Client(environment.url, folder.api_key.read_text("ascii").strip(), ANSWER_TIMEOUT_S)
    missing = wait_until_ready(client, progress, READY_TIMEOUT_S if once else float("inf"), ending)
    if ending():
        return None
    if missing:
        return _explain(f"after {READY_TIMEOUT_S:.0f} s there is still missing: {', '.join(missing)}", folder, progress)
    if not once:
        print(
            WELCOME.format(
                url=environment.url,
                metrics=", ".join(environment.metrics_urls),
                root=folder.root,
                agent=demo.AGENT,
                context=demo.CONTEXT,
            )
        )
        sys.stdout.flush()
        return None
    try:
        demo.run(client, options.database)
    except (demo.DemoFailed, RequestFailed, GatewayError, HTTPException, OSError) as error:
        if ending():
            return None
        return _explain(f"{type(error).__name__}: {error}", folder, progress)
    return 0


def _explain(reason: str, folder: Folder, progress: Progress) -> int:
    progress.say(f"error: {reason}\nThe worker's log says, last:\n{folder.log_tail('worker')}")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
