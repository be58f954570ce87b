"""What the system tells of processes. Only the standard library is needed here."""

import os
import signal
from pathlib import Path


def resident(pid: int) -> int:
    """Bytes of memory that a process takes now; 0 where the system doesn't tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def oom_kills() -> int:
    """How many processes of our control group the system has ended for want of memory; 0 where it doesn't tell."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, ValueError, IndexError):
        return 0


def how_it_ended(code: int, out_of_memory: bool) -> str:
    """``exit code 3`` or ``signal 9 (SIGKILL), out of memory``; ``code`` is minus the number of a signal."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    memory = ", out of memory" if out_of_memory and -code == signal.SIGKILL else ""
    return f"signal {-code} ({name}){memory}"
