"""Which broker and which result store an app uses, and how to make them."""

import os
import re

from aqueue import broker as brokers
from aqueue import results as stores
from aqueue.broker import Broker, BrokerFactory, BrokerOptions
from aqueue.errors import ConfigurationError
from aqueue.pidbox import Pidbox
from aqueue.results import ResultStore, StoreFactory, StoreOptions
from aqueue.serialization import Serializer
from aqueue.settings import Settings
from aqueue.url import RABBITMQ_SCHEMES, REDIS_SCHEMES, Url


class Servers:
    """Made from URLs or factories; drivers are imported by the first use."""

    def __init__(
        self, app: str, broker: str | BrokerFactory | None, backend: str | StoreFactory | None, settings: Settings
    ) -> None:
        broker = broker or os.environ.get("AQUEUE_BROKER_URL") or f"sqlite:///{_file_name(app)}.db"
        self._broker = Url(broker) if isinstance(broker, str) else broker
        backend = backend or os.environ.get("AQUEUE_RESULT_BACKEND") or None
        if backend is None and isinstance(self._broker, Url):
            backend = self._broker.reveal()
        self._store = _store(backend, self._broker)
        self._settings = settings
        self._broker_factory: BrokerFactory | None = None if isinstance(self._broker, Url) else self._broker
        self._keeper_factory: BrokerFactory | None = None
        self._store_factory: StoreFactory | None = None if isinstance(self._store, Url) else self._store

    @property
    def store_url(self) -> Url | None:
        """The result store's URL; None when the app was given a factory."""
        return self._store if isinstance(self._store, Url) else None

    @property
    def broker_name(self) -> str:
        """The broker's URL with the password hidden."""
        return str(self._broker)

    @property
    def broker_url(self) -> Url | None:
        """The broker's URL; None when the app was given a factory."""
        return self._broker if isinstance(self._broker, Url) else None

    @property
    def store_name(self) -> str:
        """The result store's URL with the password hidden."""
        return str(self._store)

    def broker(self) -> Broker:
        """A broker for the running event loop. Raises ConfigurationError."""
        if isinstance(self._broker, Url) and self._broker_factory is None:
            self._broker_factory = brokers.from_url(self._broker)
            _check_broadcasts(self._broker, self._settings)
        assert self._broker_factory is not None, "made above, or given"
        return self._broker_factory(self._broker_options())

    def keeper(self) -> Broker | None:
        """What keeps cancelled tasks where the broker itself can't: Redis, when the results are there.

        For the running event loop; None where there is no need for it, or no such store.
        """
        on_rabbitmq = isinstance(self._broker, Url) and self._broker.scheme in RABBITMQ_SCHEMES
        if not on_rabbitmq or not isinstance(self._store, Url) or self._store.scheme not in REDIS_SCHEMES:
            return None
        if self._keeper_factory is None:
            self._keeper_factory = brokers.from_url(self._store)
        return self._keeper_factory(self._broker_options())

    def _broker_options(self) -> BrokerOptions:
        settings = self._settings
        return BrokerOptions(
            lease=settings.lease,
            timeout=settings.send_timeout,
            limits=settings.limits,
            eta_queues=settings.eta_queues,
            queues=settings.queues,
            delayed_queue_type=settings.delayed_queue_type,
            pidbox=Pidbox(
                Serializer(settings.accept_content, settings.limits, settings.signer),
                settings.serializer,
                settings.cancel_expires,
            ),
        )

    def store(self) -> ResultStore:
        """A result store for the running event loop. Raises ConfigurationError."""
        if isinstance(self._store, Url) and self._store_factory is None:
            self._store_factory = stores.from_url(self._store)
        assert self._store_factory is not None, "made above, or given"
        settings = self._settings
        return self._store_factory(
            StoreOptions(
                serializer=settings.result_serializer,
                accept=settings.result_accept_content or settings.accept_content,
                compression=settings.result_compression,
                expires=settings.result_expires,
                timeout=settings.send_timeout,
                limits=settings.limits,
            )
        )


def _check_broadcasts(broker: Url, settings: Settings) -> None:
    """One process alone, as with memory://, is all workers there are."""
    names = [name for name, queue in settings.queues.items() if queue.broadcast]
    if names and broker.scheme not in (*RABBITMQ_SCHEMES, "memory"):
        raise ConfigurationError(
            f"queue {names[0]!r} is a broadcast, which only RabbitMQ can carry; {broker} would give each message to "
            "one worker"
        )


def _store(backend: str | StoreFactory | None, broker: Url | BrokerFactory) -> Url | StoreFactory:
    """``rpc://`` is the broker's own server. Raises ConfigurationError."""
    if backend is None:
        return Url("memory://")
    if not isinstance(backend, str):
        return backend
    url = Url(backend)
    if url.scheme != "rpc":
        return url
    if isinstance(broker, Url) and broker.scheme in RABBITMQ_SCHEMES:
        return broker
    raise ConfigurationError("rpc:// sends results over RabbitMQ, and the broker is another: name a result store")


def _file_name(app: str) -> str:
    return re.sub(r"[^\w.-]", "-", app)
