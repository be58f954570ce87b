"""What RabbitMQ can do at most: a blocking socket, frames prepared beforehand, no framework and no event loop.

The messages are aqueue's own, byte for byte: mandatory, persistent, confirmed, with the headers of a task.
"""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

from pamqp import commands

from aqueue.broker.amqp.messages import pack
from aqueue.drivers.amqp_codec import PROTOCOL_HEADER, FrameReader, Method, ack_frame, method_frame, publication
from aqueue.identifiers import new_id, origin
from aqueue.protocol import Call, Message, task_message, template
from aqueue.serialization import Serializer

#: Publications without a confirm, and deliveries without an acknowledgement, at once.
WINDOW: Final = 1000
_FRAME_MAX: Final = 131072
_BODY: Final = 3
_head = struct.Struct(">BxxI")
#: A whole ``basic.ack``: type, channel, size, class, method, tag, multiple, end.
_confirm = struct.Struct(">BHIHHQBB")


class Link:
    """A connection with one channel, on a blocking socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._reader = FrameReader(_FRAME_MAX)
        self.send(PROTOCOL_HEADER)
        self._answer()
        tune = self.call(commands.Connection.StartOk({}, "PLAIN", "\0guest\0guest", "en_US"), 0)
        self.send(method_frame(commands.Connection.TuneOk(tune.channel_max, _FRAME_MAX, 0), 0))
        self.call(commands.Connection.Open("/"), 0)
        self.call(commands.Channel.Open())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: Any, channel: int = 1) -> Any:
        """Send a method and return the server's answer."""
        self.send(method_frame(method, channel))
        return self._answer()

    def declare(self, queue: str, **options: Any) -> None:
        self.call(commands.Queue.Declare(queue=queue, **options))

    def ready(self, queue: str) -> int:
        """Messages that wait in a queue."""
        return int(self.call(commands.Queue.Declare(queue=queue, passive=True)).message_count)

    def delete(self, queue: str) -> None:
        self.call(commands.Queue.Delete(queue=queue))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("RabbitMQ closed the connection")
        return data

    def _answer(self) -> Any:
        while True:
            for incoming in self._reader.feed(self.receive()):
                if isinstance(incoming, Method):
                    if isinstance(incoming.method, commands.Channel.Close | commands.Connection.Close):
                        raise RuntimeError(f"RabbitMQ refuses: {incoming.method.reply_text}")
                    return incoming.method


def messages(count: int, queue: str, *, task: str = "nop", reply_to: str = "") -> list[Message]:
    """Calls as aqueue sends them."""
    common = template(task, queue=queue, serializer="json", origin=origin())
    serializer = Serializer()
    made: list[Message] = []
    for _ in range(count):
        name = new_id()
        call = Call(
            id=name, root_id=name, args=(), kwargs={}, argsrepr="()", kwargsrepr="{}", reply_to=reply_to or name
        )
        made.append(task_message(common, call, serializer))
    return made


def frames(calls: Sequence[Message]) -> list[bytes]:
    """Publications, ready to be written on channel 1."""
    packed = [pack(call) for call in calls]
    return [publication(1, one.exchange, one.routing_key, one.properties, one.body, _FRAME_MAX) for one in packed]


def publish(link: Link, prepared: Sequence[bytes]) -> float:
    """Send frames, never more than `WINDOW` of them unconfirmed; returns how many a second."""
    link.call(commands.Confirm.Select())
    unconfirmed: dict[int, None] = {}
    sent, rest = 0, b""
    start = time.perf_counter()
    while sent < len(prepared) or unconfirmed:
        free = WINDOW - len(unconfirmed)
        if free >= WINDOW // 2 and sent < len(prepared):
            part = prepared[sent : sent + free]
            unconfirmed |= dict.fromkeys(range(sent + 1, sent + len(part) + 1))
            sent += len(part)
            link.send(b"".join(part))
        data = rest + link.receive()
        whole = len(data) // _confirm.size * _confirm.size
        rest = data[whole:]
        for tag, multiple in _confirms(data[:whole]):
            if multiple:
                for one in [one for one in unconfirmed if one <= tag]:
                    del unconfirmed[one]
            else:
                del unconfirmed[tag]
    return len(prepared) / (time.perf_counter() - start)


def _confirms(data: bytes) -> Iterator[tuple[int, int]]:
    for kind, _, _, group, method, tag, multiple, _ in _confirm.iter_unpack(data):
        if (kind, group, method) != (1, 60, 80):
            raise RuntimeError("RabbitMQ refused a publication, or returned it")
        yield tag, multiple


def consume(link: Link, queue: str, count: int) -> float:
    """Take what a queue holds, `WINDOW` at once, acknowledged by halves.

    Returns how many a second, from the first tenth to the last message.
    """
    link.call(commands.Basic.Qos(prefetch_count=WINDOW))
    link.send(method_frame(commands.Basic.Consume(queue=queue, consumer_tag="floor"), 1))
    taken = acknowledged = begun = 0
    start, rest = 0.0, b""
    while taken < count:
        found, rest = _bodies(rest + link.receive())
        taken += found
        if not begun and taken >= count // 10:
            begun, start = taken, time.perf_counter()
        if taken - acknowledged >= WINDOW // 2 or taken == count:
            link.send(ack_frame(1, taken, multiple=True))
            acknowledged = taken
    return (count - begun) / (time.perf_counter() - start)


def _bodies(data: bytes) -> tuple[int, bytes]:
    """How many message bodies there are, each a frame of its own, and the beginning of a frame behind them."""
    at, length, found = 0, len(data), 0
    while length - at >= 8:
        kind, size = _head.unpack_from(data, at)
        if at + 8 + size > length:
            break
        found += kind == _BODY
        at += 8 + size
    return found, data[at:]
