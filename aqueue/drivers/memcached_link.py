"""One memcached server, spoken to by emcache.

emcache closes a connection whose command was cut short; aiomcache hands its late answer to the next command, and spins
for ever on a connection that the server has closed. One client a server, as emcache spreads keys by a rule of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from emcache import (
    Client,
    CommandError,
    MemcachedHostAddress,
    MemcachedUnixSocketPath,
    NotFoundCommandError,
    NotStoredStorageCommandError,
    StorageCommandError,
    create_client,
)

from aqueue.drivers.memcached_servers import Server
from aqueue.errors import StoreUnavailable

T = TypeVar("T")

#: To one server; the next commands wait for one that is free.
_CONNECTIONS: Final = 4


class MemcachedLink:
    """The client of one server: made when it is needed, and anew after a failure."""

    def __init__(self, server: Server, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        self._client: Client | None = None
        self._opening = asyncio.Lock()

    async def run(self, command: Callable[[Client], Awaitable[T]]) -> T:
        """What the server says. Raises StoreUnavailable; answers that say no are emcache's."""
        client: Client | None = None
        try:
            async with asyncio.timeout(self._timeout):
                client = await self._open()
                return await command(client)
        except (NotStoredStorageCommandError, NotFoundCommandError):
            raise
        except StorageCommandError as error:
            if "SERVER_ERROR" in str(error):
                raise StoreUnavailable(f"memcached at {self._server}: {error}") from None
            raise
        except TimeoutError:
            reason = f"no answer within {self._timeout:g} s"
        except (CommandError, OSError) as error:
            reason = str(error) or type(error).__name__
        await self._drop(client)
        raise StoreUnavailable(f"memcached at {self._server}: {reason}") from None

    async def _open(self) -> Client:
        async with self._opening:
            if self._client is None:
                await self._knock()  # emcache keeps a refusal to itself, and tries on
                self._client = await create_client(
                    [self._address], timeout=None, connection_timeout=self._timeout, max_connections=_CONNECTIONS
                )
            return self._client

    async def _knock(self) -> None:
        """Raise OSError when nobody listens."""
        if self._server.port:
            _, writer = await asyncio.open_connection(self._server.host, self._server.port)
        else:
            _, writer = await asyncio.open_unix_connection(self._server.host)
        writer.close()
        await writer.wait_closed()

    @property
    def _address(self) -> MemcachedHostAddress | MemcachedUnixSocketPath:
        if self._server.port:
            return MemcachedHostAddress(self._server.host, self._server.port)
        return MemcachedUnixSocketPath(self._server.host)

    async def _drop(self, client: Client | None) -> None:
        if client is not None and self._client is client:
            self._client = None
            await client.close()

    async def close(self) -> None:
        await self._drop(self._client)
