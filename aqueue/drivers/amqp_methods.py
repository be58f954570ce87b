"""Methods that name things, for any name that RabbitMQ takes.

pamqp's own refuse what the specification of 2008 does not foresee: letters beyond ASCII, braces, names of exchanges
over 127 characters. What is too long for a short string is refused when the frame is written.
"""

from pamqp import commands


class _AnyName:
    def validate(self) -> None:
        """The server knows which names it takes."""


class QueueDeclare(_AnyName, commands.Queue.Declare):
    """``queue.declare``"""


class QueueBind(_AnyName, commands.Queue.Bind):
    """``queue.bind``"""


class QueueDelete(_AnyName, commands.Queue.Delete):
    """``queue.delete``"""


class QueuePurge(_AnyName, commands.Queue.Purge):
    """``queue.purge``"""


class ExchangeDeclare(_AnyName, commands.Exchange.Declare):
    """``exchange.declare``"""


class Consume(_AnyName, commands.Basic.Consume):
    """``basic.consume``"""
