"""Identifiers: task ids, delivery tags, names of processes."""

import os
import socket


def new_id() -> str:
    """A random UUID (version 4) as text; a third of the time of ``str(uuid.uuid4())``."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def node_name(name: str = "worker") -> str:
    """``name@host``, Celery's form of a worker's name; a name that has an @ is kept (``%h`` is the host)."""
    host = socket.gethostname()
    return name.replace("%h", host) if "@" in name else f"{name}@{host}"


def origin() -> str:
    """Who sends: ``gen<pid>@<host>``."""
    return f"gen{os.getpid()}@{socket.gethostname()}"
