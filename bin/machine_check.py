"""What a machine must be to run vLLM for CPU: Linux with glibc on an x86-64 processor with AVX2.

It needs only the standard library, and its syntax is that of old Pythons, as bootstrap.py's is, which uses it.
"""

import os
import platform
import re

from stages import Refusal

GLIBC = (2, 28)  # What the wheels of torch and vLLM are built for.


def check_machine(system: str, machine: str, cpuinfo: str, libc: "tuple[str, str]") -> None:
    """Raise Refusal unless this is Linux with glibc on an x86-64 processor with AVX2."""
    if system != "Linux":
        raise Refusal("bin/run needs Linux; this is %s. Use a Linux machine, a virtual machine or WSL 2." % system)
    if machine.lower() not in ("x86_64", "amd64"):
        raise Refusal(
            "the pinned vLLM for CPU is built for x86-64 only, and this processor is %s. "
            "On a host with GPUs, install vLLM itself: pip install -e '.[cuda]'." % machine
        )
    if not re.search(r"^flags\s*:.*\bavx2\b", cpuinfo, re.MULTILINE):
        raise Refusal(
            "vLLM needs a processor with AVX2, and /proc/cpuinfo shows none. In a virtual machine, pass the host's "
            "processor through (QEMU: -cpu host)."
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        raise Refusal(
            "the packages need glibc %d.%d or newer; this system has %s. Debian 10, Ubuntu 20.04, RHEL 8 and newer "
            "have it; Alpine does not." % (GLIBC + ("%s %s" % (name, version) if name else "another C library",))
        )


def cpuinfo() -> str:
    """Return what Linux says of the processor, and nothing elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def libc() -> "tuple[str, str]":
    """Return the C library's name and version. An old Python's `platform.libc_ver` tells what it was built for."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):
        return platform.libc_ver()
    return name, version
