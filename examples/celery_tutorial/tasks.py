"""The file of Celery's first steps, with the import exchanged.

aqueue worker tasks:app
python -c "import tasks; print(tasks.add.send_sync(4, 4).id)"
"""

from aqueue import AQueue as Celery

app = Celery("tasks", broker="redis://localhost", backend="redis://localhost")


@app.task
def add(x, y):  # type: ignore[no-untyped-def]
    return x + y
