"""Making metrics, each for the processes that tell it, and putting together what one process tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeVar

from prometheus_client import Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

Process = Literal["gateway", "worker", "housekeeper"]
Processes = tuple[Process, ...]
ALL: Final[Processes] = ("gateway", "worker", "housekeeper")
GATEWAY: Final[Processes] = ("gateway",)
WORKER: Final[Processes] = ("worker",)
HOUSEKEEPER: Final[Processes] = ("housekeeper",)
#: Those that ask governance, and those whose threads share connections to Redis.
GOVERNING: Final[Processes] = ("gateway", "worker")
POOLED: Final[Processes] = ("gateway", "housekeeper")

INSTRUMENTS: Final[Mapping[Process, CollectorRegistry]] = {process: CollectorRegistry() for process in ALL}
READINGS: Final[list[Reading]] = []
Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)

# Series that say when others were made would double their number, and tell nothing that the process's own start does not.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Reading:
    """A metric whose value is looked up when somebody asks; `counts` tells that it only grows."""

    def __init__(
        self, of: Processes, name: str, help_: str, labels: Sequence[str] = (), *, counts: bool = False
    ) -> None:
        self.of, self.name, self.help, self.labels, self.counts = of, name, help_, tuple(labels), counts
        READINGS.append(self)

    def now(self, value: float) -> Metric:
        """Return it as it is, without labels."""
        return self.by({(): value})

    def by(self, values: Mapping[tuple[str, ...], float]) -> Metric:
        """Return it as it is, for each tuple of label values."""
        kind = CounterMetricFamily if self.counts else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in values.items():
            family.add_metric(labels, float(value))
        return family


def counter(of: Processes, name: str, help_: str, labels: Sequence[str] = ()) -> Counter:
    """Return a counter that these processes tell."""
    return _told_by(of, Counter(name, help_, labels, registry=None))


def gauge(of: Processes, name: str, help_: str, labels: Sequence[str] = ()) -> Gauge:
    """Return a gauge that these processes tell."""
    return _told_by(of, Gauge(name, help_, labels, registry=None))


def histogram(of: Processes, name: str, help_: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
    """Return a histogram that these processes tell."""
    return _told_by(of, Histogram(name, help_, labels, buckets=buckets, registry=None))


def _told_by(processes: Processes, instrument: Instrument) -> Instrument:
    for process in processes:
        INSTRUMENTS[process].register(instrument)
    return instrument


def told_by(process: Process, *readings: Collector) -> CollectorRegistry:
    """Return all that one process tells: its instruments, these readings, and what the system knows of the process."""
    registry = CollectorRegistry()
    for collector in (INSTRUMENTS[process], *readings):
        registry.register(collector)
    ProcessCollector(registry=registry)
    return registry
