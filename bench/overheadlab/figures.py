"""What all the cells showed: a table for people, and the same with more digits as JSON.

Each figure is a median over the rounds. What a system adds to latency is what a client waits with it, less what the same
client waits in the same round for the model alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.overheadlab.rounds import Rounds, Sample

DIRECT = "direct"
_HEAD = f"{'load':<12}{'system':<17}{'CPU ms a request':>24}{'requests/s':>12}{'added p50 ms':>14}{'p99 ms':>9}{'chunks':>8}"


def cpu_ms(samples: Sequence[Sample]) -> list[float]:
    """Return each round's processor time, summed over all processes, in milliseconds a request."""
    return [sum(sample.cpu_ms.values()) for sample in samples]


def added_ms(rounds: Rounds, system: str, load: str, of: str) -> float:
    """Return the added latency: `of` is `p50_ms`, `p99_ms` or `first_ms`."""
    pairs = zip(rounds.samples[system, load], rounds.beside[system, load], strict=True)
    return statistics.median(float(getattr(through, of) - getattr(alone, of)) for through, alone in pairs)


def ratio(rounds: Rounds, system: str, other: str, load: str) -> float:
    """Return what part of the other's processor time a system uses, round by round."""
    pairs = zip(cpu_ms(rounds.samples[system, load]), cpu_ms(rounds.samples[other, load]), strict=False)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def per_s(rounds: Rounds, system: str, load: str) -> float:
    """Return the requests that were answered in a second."""
    return statistics.median(sample.per_s for sample in rounds.samples[system, load])


def tell(rounds: Rounds) -> dict[str, float]:
    """Return all figures, by name."""
    figures: dict[str, float] = {}
    for (system, load), found in rounds.samples.items():
        used, of = cpu_ms(found), f"{system} {load}"
        figures |= {
            f"{of} cpu_ms": statistics.median(used),
            f"{of} cpu_ms_least": min(used),
            f"{of} cpu_ms_most": max(used),
            f"{of} per_s": per_s(rounds, system, load),
            f"{of} chunks": statistics.median(sample.chunks for sample in found),
            f"{of} requests": float(sum(sample.requests for sample in found)),
        }
        if len(found[0].cpu_ms) > 1:
            parts = {part: statistics.median(sample.cpu_ms[part] for sample in found) for part in found[0].cpu_ms}
            figures |= {f"{of} cpu_ms {part}": value for part, value in parts.items()}
        if system != DIRECT:
            names = ("p50_ms", "p99_ms", "first_ms")
            figures |= {f"{of} added_{name}": added_ms(rounds, system, load, name) for name in names}
    return figures


def table(rounds: Rounds) -> str:
    """Return the figures people look at, a line a system and load; of processor time with the least and the most."""
    lines, before = [_HEAD], ""
    for system, load in sorted(rounds.samples, key=lambda key: _place(rounds, key[1])):
        found = rounds.samples[system, load]
        used = cpu_ms(found)
        spread = f"{statistics.median(used):.2f} ({min(used):.2f}-{max(used):.2f})"
        added = ["", ""]
        if system != DIRECT:
            added = [f"{added_ms(rounds, system, load, of):.1f}" for of in ("p50_ms", "p99_ms")]
        chunks = statistics.median(sample.chunks for sample in found)
        lines += [] if load == before else [""]
        lines.append(
            f"{load:<12}{system:<17}{spread:>24}{per_s(rounds, system, load):>12.0f}"
            f"{added[0]:>14}{added[1]:>9}{chunks:>8.1f}"
        )
        before = load
    return "\n".join([*lines, ""])


def by_part(rounds: Rounds, clients: int) -> str:
    """Return the processor time of systems of several processes, by what they do, in milliseconds a request."""
    found = {key: samples for key, samples in rounds.samples.items() if len(samples[0].cpu_ms) > 1}
    parts = list(dict.fromkeys(part for samples in found.values() for part in samples[0].cpu_ms))
    lines = [f"{'CPU ms a request':<29}" + "".join(f"{part:>12}" for part in parts)]
    for (system, load), samples in found.items():
        if load.endswith(f" {clients}"):
            used = [statistics.median(sample.cpu_ms.get(part, 0.0) for sample in samples) for part in parts]
            lines.append(f"{load:<12}{system:<17}" + "".join(f"{value:>12.2f}" for value in used))
    return "\n".join([*lines, ""])


def _place(rounds: Rounds, load: str) -> int:
    return list(dict.fromkeys(name for _, name in rounds.samples)).index(load)
