"""A GPU worker whose own times are as long, for its engine, as they would be without dilation of time.

Celery is given this instead of `worker_gpu`. Without it a worker on an engine that is 15 times as slow would tell what its cache
holds, for the engine, 15 times as soon, and an advantage would be measured that no deployment has. It would also look 15 times as
often for profiles to be kept in the cache, and keep none for longer than a fifteenth of the time.
"""

from __future__ import annotations

import os
from types import ModuleType

from bench.schedulinglab.http_work import SCALE_VARIABLE
from worker_gpu import freshness, refresher, reporting
from worker_gpu.celery import app

__all__ = ["app"]


def _stretch(module: ModuleType, name: str) -> None:
    setattr(module, name, getattr(module, name) * float(os.environ[SCALE_VARIABLE]))


_stretch(reporting, "JOIN_S")
_stretch(freshness, "KEPT_S")
_stretch(refresher, "LOOK_EVERY_S")
_stretch(refresher, "LONGEST_S")
