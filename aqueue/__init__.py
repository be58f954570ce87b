"""aqueue: an asyncio-native task queue that speaks Celery's wire protocol."""

from aqueue.app import AQueue
from aqueue.async_result import AsyncResult
from aqueue.attempts import Attempt
from aqueue.broker import Queue
from aqueue.context import Context, current
from aqueue.errors import (
    AQueueError,
    BadMessage,
    BrokerUnavailable,
    ConfigurationError,
    Dead,
    EncodeError,
    EnqueueFailed,
    EnqueueUnknown,
    Ignore,
    InvalidArguments,
    MessageTooLarge,
    Reject,
    ResultError,
    ResultIgnored,
    ResultTimeout,
    ResultUnknown,
    Snooze,
    SoftTimeLimitExceeded,
    StoreUnavailable,
    TaskFailed,
    TaskRevoked,
    TimeLimitExceeded,
    WorkerLostError,
)
from aqueue.options import Options
from aqueue.retry import Retry
from aqueue.serialization import Limits
from aqueue.settings import Settings
from aqueue.task import AsyncTask, Signature, SyncTask, Task

__version__ = "0.1.0"

__all__ = [
    "AQueue",
    "AQueueError",
    "AsyncResult",
    "AsyncTask",
    "Attempt",
    "BadMessage",
    "BrokerUnavailable",
    "ConfigurationError",
    "Context",
    "Dead",
    "EncodeError",
    "EnqueueFailed",
    "EnqueueUnknown",
    "Ignore",
    "InvalidArguments",
    "Limits",
    "MessageTooLarge",
    "Options",
    "Queue",
    "Reject",
    "ResultError",
    "ResultIgnored",
    "ResultTimeout",
    "ResultUnknown",
    "Retry",
    "Settings",
    "Signature",
    "Snooze",
    "SoftTimeLimitExceeded",
    "StoreUnavailable",
    "SyncTask",
    "Task",
    "TaskFailed",
    "TaskRevoked",
    "TimeLimitExceeded",
    "WorkerLostError",
    "current",
]
