"""What detection costs a request: 2 KB of each kind of ordinary text, longer ones, and texts made to be slow.

The texts are made from the seed and hold what such texts hold, findings among them. The figures are milliseconds of
one scan in this process; `hostile_ratio` is how many times longer than prose the slowest text of 1 MB takes, of those
made of what patterns begin with, over and over. Times are of the processor, so that other programs do not count.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence

from bench.report import arguments, finish
from gateway_app.detection import Detector

KB, MB = 1024, 1_000_000
WORDS = """
the service reads its queue and writes what it has done to a table so that whoever asks later can see when a request
came which worker took it and how long the model needed for an answer that nobody had to wait for twice token key
password secret call phone number account order customer invoice please check whether
""".split()  # noqa: SIM905  as a list it would fill the screen
#: What the rules' patterns begin with, and what their repetitions take.
HOSTILE = (
    "1", "0", "12 ", "1234 ", "1-", "4111111111111112 ", "4111-1111-1111-1112 ", "0123 4567 8901 ", "01 ", "+1", "+",
    "a", "a.", "@", "a@", "a@b.", "-", "_", "sk-", "eyJ", "eyJa.", "AKIA", "ghp_", "xoxb-", "://", "://a:", ":", "=",
    "password", "password=", "password: ", "-token ", "secret:", "secret_", "token is ", "key", "bearer ", "basic ",
    "DE89 ", "aa00", "aa00 ", "-----BEGIN ", "PRIVATE KEY-----", "phone ", "phone 1", "call me at ", "tel", "ssn ",
    "bsn: ", "pesel", "a1", "é", "٣", "漢", "\\n", '\\"', "%40", '{"', "x\u200b",
)  # fmt: skip


def prose(rng: random.Random, length: int) -> str:
    """Return English words in sentences, with a number or an address now and then."""
    parts: list[str] = []
    size = 0
    while size < length:
        part = " ".join(rng.choices(WORDS, k=rng.randint(6, 16))).capitalize() + ". "
        if rng.random() < 0.1:
            part += f"Order {rng.randrange(10**8)} is from {rng.choice(WORDS)}@example.com. "
        parts.append(part)
        size += len(part)
    return "".join(parts)[:length]


def structured(rng: random.Random, length: int) -> str:
    """Return records as JSON, as a context is rendered."""
    records = [
        {
            "id": f"{rng.getrandbits(128):032x}",
            "host": f"db-{rng.randrange(99)}.internal",
            "at": 1_764_000_000 + rng.randrange(10**6),
            "ratio": rng.random(),
            "token_count": rng.randrange(4000),
            "key": rng.choice(WORDS),
            "message": " ".join(rng.choices(WORDS, k=8)),
        }
        for _ in range(length // 200 + 1)
    ]
    return json.dumps(records, indent=1)[:length]


def logs(rng: random.Random, length: int) -> str:
    """Return the lines of a log that is mostly digits."""
    lines = [
        f"2026-11-{rng.randrange(1, 31):02d}T{rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}."
        f"{rng.randrange(10**6):06d}Z 10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}:"
        f"{rng.randrange(65536)} pid={rng.randrange(10**5)} span={rng.getrandbits(64)} order={rng.randrange(10**16)} "
        f"took {rng.random() * 1000:.3f} ms v{rng.randrange(9)}.{rng.randrange(30)}.{rng.randrange(99)} "
        f"{rng.getrandbits(128):032x}"
        for _ in range(length // 120 + 1)
    ]
    return "\n".join(lines)[:length]


def unicode_text(rng: random.Random, length: int) -> str:
    """Return words of several scripts; `length` is in characters."""
    words = ["Prüfung", "здравствуйте", "会议室", "números", "données", "٢٠٢٦", "naïve", "12\N{NO-BREAK SPACE}345"]
    return " ".join(rng.choices(words, k=length // 5))[:length]


def customers(rng: random.Random, length: int) -> str:
    """Return lines that hold little but what is looked for."""
    lines = [
        f"{rng.choice(WORDS)}.{rng.choice(WORDS)}@example.com,+44 20 7946 {rng.randrange(10**4):04d},"
        f"DE{rng.randrange(100):02d} 3704 0044 0532 {rng.randrange(10**4):04d} 00,4111 1111 1111 {rng.randrange(10**4):04d},"
        f"536-90-{rng.randrange(10**4):04d},password={rng.getrandbits(40):x},(212) 555-{rng.randrange(10**4):04d}"
        for _ in range(length // 140 + 1)
    ]
    return "\n".join(lines)[:length]


ORDINARY = {"prose": prose, "json": structured, "logs": logs, "unicode": unicode_text, "customers": customers}


def scans(detector: Detector, texts: Sequence[str], runs: int) -> list[float]:
    """Return how long `runs` scans of `texts`, in turn, took in milliseconds, sorted."""
    took = []
    for run in range(runs):
        text = texts[run % len(texts)]
        began = time.thread_time()
        detector.scan([text])
        took.append((time.thread_time() - began) * 1000)
    return sorted(took)


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=400, help="of each text of 2 KB; default: %(default)s")
    options = parser.parse_args()
    began = time.thread_time()
    detector = Detector()
    figures = {"make_detector_ms": (time.thread_time() - began) * 1000}
    for name, make in ORDINARY.items():
        rng = random.Random(options.seed)
        took = scans(detector, [make(rng, 2 * KB) for _ in range(20)], options.runs)
        figures |= {f"{name}_2kb_p50_ms": took[len(took) // 2], f"{name}_2kb_p99_ms": took[int(len(took) * 0.99)]}
    for name, make in ORDINARY.items():
        for label, length in (("30kb", 30 * KB), ("1mb", MB)):
            figures[f"{name}_{label}_p50_ms"] = scans(detector, [make(random.Random(options.seed), length)], 5)[2]
    slowest = {part: scans(detector, [hostile(part)], 2)[0] for part in HOSTILE}
    by_time = sorted(slowest, key=slowest.__getitem__)
    print("Slowest repetitions of 1 MB:", {part: f"{slowest[part]:.0f} ms" for part in by_time[-5:]})
    figures["hostile_1mb_ms"] = slowest[by_time[-1]]
    figures["hostile_ratio"] = slowest[by_time[-1]] / figures["prose_1mb_p50_ms"]
    targets = {f"{name}_2kb_p50_ms": ("<=", 1.0) for name in ORDINARY}
    finish("detection", options, figures, {**targets, "hostile_ratio": ("<=", 20.0)})


def hostile(pattern: str) -> str:
    """Return 1 MB of one pattern."""
    return (pattern * (MB // len(pattern) + 1))[:MB]


if __name__ == "__main__":
    main()
