"""A GPU worker that tells what its cache holds as late, for its engine, as it would without dilation of time.

Celery is given this instead of `worker_gpu`. Without it a worker on an engine that is 15 times as slow would tell, for the
engine, 15 times as soon, and an advantage would be measured that no deployment has.
"""

from __future__ import annotations

import os

from bench.schedulinglab.http_work import SCALE_VARIABLE
from worker_gpu import reporting
from worker_gpu.celery import app

__all__ = ["app"]

setattr(reporting, "JOIN_S", reporting.JOIN_S * float(os.environ[SCALE_VARIABLE]))  # noqa: B010  mypy knows it as final
