"""Our link to RabbitMQ beside aiormq's, the one beneath aio-pika: the same messages, server and event loop.

Prints rates a second and microseconds a message, of each, as JSON::

    python -m benchmarks.codec amqp://localhost 20000
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiormq
import uvloop
from aiormq.abc import DeliveredMessage
from pamqp import body, commands, header
from pamqp.frame import marshal, unmarshal

from aqueue.broker.amqp.messages import pack
from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import Delivered, FrameReader, ack_frame, decode_properties, publication
from aqueue.drivers.amqp_connection import AmqpConnection
from aqueue.drivers.amqp_publisher import Publisher, nothing_to_prepare
from aqueue.protocol import Message
from aqueue.url import Url
from benchmarks.rabbitmq_floor import WINDOW, Link, messages

QUEUE = "codec"
FRAME_MAX = 131072
ROUNDS = 3


async def main(url: str, count: int) -> None:
    calls = messages(count, QUEUE)
    address = AmqpAddress.parse(Url(url))
    with Link(address.hosts[0][1]) as link:
        link.declare(QUEUE, durable=True)
    found: dict[str, dict[str, float]] = {
        "write": {"aqueue": least(our_writing, calls), "aiormq": least(pamqp_writing, calls)},
        "read": {"aqueue": least(our_reading, calls), "aiormq": least(pamqp_reading, calls)},
        "publish": {},
        "consume": {},
    }
    found["publish"]["aqueue"] = await our_publishing(address, calls)
    found["consume"]["aqueue"] = await our_consuming(address, count)
    found["publish"]["aiormq"] = await aiormq_publishing(url, calls)
    found["consume"]["aiormq"] = await aiormq_consuming(url, count)
    print(json.dumps(found))


# --- the codec alone ---


def least(work: Callable[[Sequence[Message]], float], calls: Sequence[Message]) -> float:
    """Microseconds a message, of the best round."""
    return min(work(calls[:5000]) for _ in range(ROUNDS))


def our_writing(calls: Sequence[Message]) -> float:
    with_frames: list[bytes] = []
    start = time.perf_counter()
    for call in calls:
        one = pack(call)
        with_frames.append(publication(1, "", one.routing_key, one.properties, one.body, FRAME_MAX))
    return each(start, calls)


def pamqp_writing(calls: Sequence[Message]) -> float:
    start = time.perf_counter()
    for call in calls:
        b"".join(pamqp_frames(call))
    return each(start, calls)


def our_reading(calls: Sequence[Message]) -> float:
    data = b"".join(b"".join(delivery(call, tag)) for tag, call in enumerate(calls, 1))
    reader = FrameReader(FRAME_MAX)
    start = time.perf_counter()
    for begin in range(0, len(data), 65536):  # as the event loop hands it on
        for incoming in reader.feed(data[begin : begin + 65536]):
            assert isinstance(incoming, Delivered)
            decode_properties(incoming.properties)
    return each(start, calls)


def pamqp_reading(calls: Sequence[Message]) -> float:
    frames = [frame for tag, call in enumerate(calls, 1) for frame in delivery(call, tag)]
    start = time.perf_counter()
    for frame in frames:  # one by one, as aiormq takes them from its stream
        unmarshal(frame)
    return each(start, calls)


def each(start: float, calls: Sequence[Message]) -> float:
    return (time.perf_counter() - start) / len(calls) * 1e6


def pamqp_frames(call: Message) -> Iterator[bytes]:
    yield marshal(commands.Basic.Publish(routing_key=call.queue, mandatory=True), 1)
    yield from content(call)


def delivery(call: Message, tag: int) -> Iterator[bytes]:
    yield marshal(commands.Basic.Deliver("tag", tag, False, "", call.queue), 1)
    yield from content(call)


def content(call: Message) -> Iterator[bytes]:
    yield marshal(header.ContentHeader(0, len(call.body), properties_of(call)), 1)
    yield marshal(body.ContentBody(call.body), 1)


def properties_of(call: Message) -> commands.Basic.Properties:
    return commands.Basic.Properties(
        content_type=call.content_type,
        content_encoding=call.content_encoding,
        headers=call.headers,
        priority=call.priority,
        **call.properties,
    )


# --- with the server ---


async def our_publishing(address: AmqpAddress, calls: Sequence[Message]) -> float:
    publisher = Publisher(address, 30.0)

    async def send(call: Message) -> None:
        await publisher.publish([pack(call)], nothing_to_prepare)

    try:
        return await publish_rate(send, calls)
    finally:
        await publisher.close()


async def aiormq_publishing(url: str, calls: Sequence[Message]) -> float:
    connection = await aiormq.connect(url)
    channel = await connection.channel()

    async def send(call: Message) -> None:
        await channel.basic_publish(call.body, routing_key=QUEUE, properties=properties_of(call), mandatory=True)

    try:
        return await publish_rate(send, calls)
    finally:
        await connection.close()


async def publish_rate(send: Callable[[Message], Any], calls: Sequence[Message]) -> float:
    """Confirmed publications a second, `WINDOW` at once."""
    start = time.perf_counter()
    for begin in range(0, len(calls), WINDOW):
        await asyncio.gather(*[send(call) for call in calls[begin : begin + WINDOW]])
    return len(calls) / (time.perf_counter() - start)


class Taken:
    """Counts deliveries; says when half a window is to be acknowledged."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0
        self.done = asyncio.get_running_loop().create_future()

    def one_more(self) -> bool:
        self.taken += 1
        if self.taken == self.count:
            self.done.set_result(None)
        return self.taken % (WINDOW // 2) == 0 or self.taken == self.count

    async def rate(self, start: float) -> float:
        await asyncio.wait_for(self.done, 120)
        return self.count / (time.perf_counter() - start)


async def our_consuming(address: AmqpAddress, count: int) -> float:
    connection = await AmqpConnection.connect(address, 0.0)
    channel = await connection.open_channel()
    taken = Taken(count)

    def on_delivery(delivered: Delivered) -> None:
        decode_properties(delivered.properties)
        if taken.one_more():
            connection.write(ack_frame(channel.number, delivered.tag, multiple=True))

    channel.on_delivery = on_delivery
    await channel.call(commands.Basic.Qos(prefetch_count=WINDOW))
    start = time.perf_counter()
    await channel.call(commands.Basic.Consume(queue=QUEUE, consumer_tag="codec"))
    try:
        return await taken.rate(start)
    finally:
        await connection.close()


async def aiormq_consuming(url: str, count: int) -> float:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    taken = Taken(count)

    async def on_delivery(message: DeliveredMessage) -> None:
        if taken.one_more():
            assert message.delivery_tag is not None
            await channel.basic_ack(message.delivery_tag, multiple=True)

    await channel.basic_qos(prefetch_count=WINDOW)
    start = time.perf_counter()
    await channel.basic_consume(QUEUE, on_delivery)
    try:
        return await taken.rate(start)
    finally:
        await connection.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2])))
