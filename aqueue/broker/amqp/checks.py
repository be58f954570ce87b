"""Whether a RabbitMQ server is fit to be a broker, as far as it tells over AMQP."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from aqueue.broker import Queue, arguments_of
from aqueue.broker.amqp.broadcast import Broadcasts
from aqueue.drivers.amqp_connection import AmqpConnection, ChannelClosed
from aqueue.drivers.amqp_methods import QueueDeclare
from aqueue.findings import Finding, Use

_OLDEST: Final = (3, 10)
#: AMQP's code for a declaration that says otherwise than what is there.
_OTHERWISE: Final = 406
#: From here on a quorum queue gives up after twenty deliveries by itself.
_LIMITS_BY_ITSELF: Final = (4, 0)
#: Seconds a consumer may hold a message, unless the server's configuration says otherwise.
_USUAL_TIMEOUT: Final = 1800.0


async def check(
    connection: AmqpConnection, shown: str, queues: Mapping[str, Queue], broadcasts: Broadcasts, use: Use
) -> list[Finding]:
    """Raises ConnectionLost, ChannelClosed."""
    version = version_of(connection.server)
    found = [*too_old(shown, connection.server, version)]
    for name, longest in use.queues.items():
        if name in broadcasts:
            continue
        queue = arguments_of(queues, name)
        found += [*given_up(name, queue, version), *too_slow(shown, name, queue, longest)]
        found += await _declared(connection, name, queue)
    return found


def version_of(server: Mapping[str, Any]) -> tuple[int, ...]:
    """``server`` is what it says of itself at login; () when that is no RabbitMQ's version."""
    text = str(server.get("version", ""))
    numbers = text.split("-", maxsplit=1)[0].split("+", maxsplit=1)[0].split(".")
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else ()


def too_old(shown: str, server: Mapping[str, Any], version: tuple[int, ...]) -> Iterator[Finding]:
    if server.get("product") == "RabbitMQ" and version and version < _OLDEST:
        yield Finding("AQ125", f"{shown} is RabbitMQ {server['version']}", "upgrade it to 3.10 or newer")


def given_up(name: str, queue: Queue, version: tuple[int, ...]) -> Iterator[Finding]:
    """What a quorum queue does with a message that was delivered too often."""
    arguments = queue.all_arguments
    limited = "x-delivery-limit" in arguments or version >= _LIMITS_BY_ITSELF
    if queue.is_quorum and limited and "x-dead-letter-exchange" not in arguments:
        yield Finding(
            "AQ122",
            f"quorum queue {name} drops what was delivered too often, unless a policy says where to put it",
            'add "x-dead-letter-exchange": "" and "x-dead-letter-routing-key": "aqueue.dead" to its arguments, or to a '
            "policy, and then AQ122 to Settings.ignored_checks",
        )


def too_slow(shown: str, name: str, queue: Queue, longest: float) -> Iterator[Finding]:
    """Whether the server takes a message back while its task may still run."""
    told = queue.all_arguments.get("x-consumer-timeout")
    runs = f"tasks of queue {name} may run for {longest:g} s"
    if isinstance(told, int) and told / 1000 < longest:
        what = f"{runs}, but its x-consumer-timeout takes their messages back after {told / 1000:g} s"
        yield Finding("AQ123", what, "raise x-consumer-timeout (milliseconds), or lower the tasks' timeout")
    elif told is None and longest > _USUAL_TIMEOUT:
        what = f"{runs}; {shown} takes their messages back after {_USUAL_TIMEOUT:g} s unless it is told otherwise"
        step = f"consumer_timeout = {round(longest * 1000) + 60_000} in rabbitmq.conf, or lower the tasks' timeout"
        yield Finding("AQ124", what, step)


async def _declared(connection: AmqpConnection, name: str, queue: Queue) -> list[Finding]:
    """Whether a queue that is there has the arguments that the settings say; one that is not is left alone."""
    channel = await connection.open_channel()
    try:
        await channel.call(QueueDeclare(queue=name, passive=True))
        await channel.call(QueueDeclare(queue=name, durable=True, arguments=dict(queue.all_arguments)))
    except ChannelClosed as error:
        if error.code != _OTHERWISE:  # not there, or not for us to declare
            return []
        step = "say the same of it in the whole fleet: in Settings.queues, or delete it when it is empty"
        return [Finding("AQ121", f"queue {name} is there, and otherwise than the settings say: {error}", step)]
    finally:
        channel.close()
    return []
