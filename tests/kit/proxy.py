"""A TCP proxy that does what networks do: cut, also in the middle of a frame, go silent, refuse, delay."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress


class Proxy:
    """Forwards a loopback port to another, in a thread of its own; faults are switched on from the test."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._loop = asyncio.new_event_loop()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._open = {"server": asyncio.Event(), "client": asyncio.Event()}
        self._refusing = False
        #: In which direction the next bytes are cut in half.
        self._mid_frame = ""
        self.delay = 0.0
        self.connections = 0
        self.port = 0
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fault-proxy", daemon=True)
        self._thread.start()
        started.wait(5)

    def cut(self) -> None:
        """Reset every connection, in both directions."""
        self._call(self._reset_all)

    def cut_mid_frame(self, towards: str) -> None:
        """Let half of what comes next through to ``server`` or ``client``, and end that connection."""
        self._mid_frame = towards

    def silence(self, *towards: str) -> None:
        """Swallow everything from now on, without closing anything: a half-open link.

        Named, ``server`` or ``client`` alone hears nothing more.
        """
        for one in towards or self._open:
            self._call(self._open[one].clear)

    def heal(self) -> None:
        self._refusing = False
        self._mid_frame = ""
        for one in self._open.values():
            self._call(one.set)

    def refuse(self) -> None:
        """Reset every connection, and every new one at once."""
        self._refusing = True
        self.cut()

    def close(self) -> None:
        self._call(self._reset_all)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(function)
        self._loop.call_soon_threadsafe(done.set)
        done.wait(5)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        for one in self._open.values():
            one.set()
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        self.connections += 1
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        pair = (writer, other_writer)
        self._pairs.add(pair)
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(
                self._forward(reader, other_writer, "server"), self._forward(other_reader, writer, "client")
            )
        for one in pair:  # the other end may not know that this one is gone
            one.close()
        self._pairs.discard(pair)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, towards: str) -> None:
        while data := await reader.read(65536):
            await self._open[towards].wait()
            if self._mid_frame == towards:
                self._mid_frame = ""
                writer.write(data[: len(data) // 2])
                raise ConnectionAbortedError  # a polite end: after a reset nobody would see the half
            if self.delay:
                await asyncio.sleep(self.delay)
            writer.write(data)
            await writer.drain()
        writer.close()

    def _reset_all(self) -> None:
        for pair in self._pairs:
            for writer in pair:
                _reset(writer)
        self._pairs.clear()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset instead of a polite end."""
    found = writer.get_extra_info("socket")
    if found is not None:
        with suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
