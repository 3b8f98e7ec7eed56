"""Where a number was taken: processor, cores, memory, system and library versions, and the command that took it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trilemma.core.record import Record

_PACKAGES = ("trilemma", "numpy", "torch", "tokenizers", "scipy", "pydantic")


class Environment(Record):
    """The host and versions behind a results file."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]
    isa: str = ""
    threads: int = 0
    model_hash: str = ""
    recipe_hash: str = ""
    seed: int = 0


def read_environment(
    *, isa: str = "", threads: int = 0, model_hash: str = "", recipe_hash: str = "", seed: int = 0
) -> Environment:
    """This host and the versions installed, with what the caller knows of the run."""
    return Environment(
        cpu=cpu_name(), cores=usable_cores(), memory_bytes=total_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(), packages=_installed(), isa=isa, threads=threads,
        model_hash=model_hash, recipe_hash=recipe_hash, seed=seed,
    )  # fmt: skip


def command_line() -> str:
    """The `trilemma` command that this process runs, quoted for a shell; '' when it is another program."""
    program = Path(sys.argv[0])
    if program.stem != "trilemma" and (program.name, program.parent.name) != ("__main__.py", "trilemma"):
        return ""
    return shlex.join(["trilemma", *sys.argv[1:]])


def cpu_name() -> str:
    """The processor's name as the system gives it; perhaps only its architecture."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.lower().startswith(("model name", "hardware")):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: affinity, not the machine's count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes() -> int:
    """Memory of the machine, in use or not; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
