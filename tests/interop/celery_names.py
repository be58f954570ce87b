"""What these tests use of Celery and its parts, which come without types."""

from importlib import import_module
from typing import Any, Final

_billiard: Final[Any] = import_module("billiard.exceptions")
_celery: Final[Any] = import_module("celery")
_broadcast: Final[Any] = import_module("kombu.common")
_exceptions: Final[Any] = import_module("celery.exceptions")
_kombu: Final[Any] = import_module("kombu")
_results: Final[Any] = import_module("celery.result")

Broadcast: Final = _broadcast.Broadcast
Celery: Final = _celery.Celery
MaxRetriesExceededError: Final = _exceptions.MaxRetriesExceededError
NotRegistered: Final = _exceptions.NotRegistered
TaskRevokedError: Final = _exceptions.TaskRevokedError
SoftTimeLimitExceeded: Final = _billiard.SoftTimeLimitExceeded
TimeLimitExceeded: Final = _billiard.TimeLimitExceeded
ResultSet: Final = _results.ResultSet
group: Final = _celery.group
Exchange: Final = _kombu.Exchange
Queue: Final = _kombu.Queue
pools: Final[Any] = import_module("kombu.pools")
