"""A Celery client in a process of its own: ``python -m tests.interop.ask TASK QUEUE [ARGUMENT]...``.

Arguments are JSON; so is the answer, the value or the class and the arguments of the exception.
"""

import json
import sys

from tests.interop.celery_app import app


def main(task: str, queue: str, *arguments: str) -> None:
    result = app.send_task(task, [json.loads(argument) for argument in arguments], queue=queue)
    try:
        answer = {"value": result.get(timeout=20)}
    except Exception as error:
        answer = {"error": type(error).__name__, "args": list(error.args)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
