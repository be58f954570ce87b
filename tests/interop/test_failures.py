"""How one side sees that a task of the other side failed."""

import asyncio
import traceback
from typing import Any

import pytest

from aqueue import AQueue, AsyncResult, TaskFailed
from tests.interop.celery_names import SoftTimeLimitExceeded, TimeLimitExceeded
from tests.interop.conftest import SOON, TO_AQUEUE, TO_CELERY, Connect, Fleet, ended
from tests.interop.tasks import Declined, Shop

# --- a Celery client asks an aqueue worker ---------------------------------------------------------------------------


async def failure_at_celery(fleet: Fleet, task: str, *args: Any, **options: Any) -> tuple[BaseException, Any]:
    """What ``get`` raises, and Celery's result."""
    result = fleet.client.send_task(task, args, queue=TO_AQUEUE, **options)
    with pytest.raises(Exception) as caught:
        await ended(result)
    return caught.value, result


async def test_a_celery_client_gets_the_builtin_exception_that_an_aqueue_task_raised(fleet: Fleet) -> None:
    error, result = await failure_at_celery(fleet, "interop.fail", "bööm")
    assert type(error) is ValueError
    assert error.args == ("bööm",)
    assert result.state == "FAILURE"
    assert result.failed()
    assert not result.successful()
    assert result.ready()


async def test_a_celery_client_gets_every_argument_of_the_exception(fleet: Fleet) -> None:
    error, _ = await failure_at_celery(fleet, "interop.fail_with_two", "first", 2)
    assert type(error) is KeyError
    assert error.args == ("first", 2)


async def test_a_celery_client_gets_an_exception_of_the_applications_own(fleet: Fleet) -> None:
    error, _ = await failure_at_celery(fleet, "interop.decline", "no money", 402)
    assert type(error) is Declined
    assert error.reason == "no money"
    assert error.code == 402


async def test_a_celery_client_gets_an_exception_whose_class_is_inside_of_another(fleet: Fleet) -> None:
    error, _ = await failure_at_celery(fleet, "interop.fail_as_closed", "today")
    assert type(error) is Shop.Closed
    assert error.args == ("today",)


async def test_a_celery_client_gets_the_document_that_an_exception_holds(fleet: Fleet) -> None:
    details = {"amount": ["too much", "not a number"], "currency": None}
    error, _ = await failure_at_celery(fleet, "interop.decline_in_detail", details)
    assert type(error) is Declined
    assert error.reason == details


async def test_a_celery_client_gets_a_named_stand_in_for_a_class_that_it_can_not_import(fleet: Fleet) -> None:
    error, _ = await failure_at_celery(fleet, "interop.fail_strangely", "odd")
    assert type(error).__name__.endswith("Strange")
    assert error.args == ("odd",)


async def test_a_celery_client_gets_an_exception_whose_arguments_can_not_be_written(fleet: Fleet) -> None:
    error, _ = await failure_at_celery(fleet, "interop.fail_with_an_object")
    assert type(error) is ValueError
    assert error.args[0] == "with"
    assert "Path" in error.args[1]


async def test_a_celery_client_sees_the_traceback_of_an_aqueue_task(fleet: Fleet) -> None:
    _, result = await failure_at_celery(fleet, "interop.decline", "no money", 402)
    assert result.traceback.startswith("Traceback (most recent call last):")
    assert "in decline" in result.traceback
    assert "raise Declined(reason, code)" in result.traceback
    assert result.traceback.rstrip().endswith("Declined: ('no money', 402)")


async def test_a_celery_client_sees_wrong_arguments_as_a_type_error(fleet: Fleet) -> None:
    error, result = await failure_at_celery(fleet, "interop.add", 1)
    assert isinstance(error, TypeError)
    assert "'y'" in str(error)
    assert result.state == "FAILURE"


async def test_a_celery_client_that_does_not_know_aqueue_sees_wrong_arguments_as_a_type_error(fleet: Fleet) -> None:
    """Celery looks classes up among what is imported; a client has no reason to import aqueue."""
    _, result = await failure_at_celery(fleet, "interop.add", 1)
    stored = await asyncio.to_thread(result.backend.get, result.backend.get_key_for_task(result.id))
    document = result.backend.decode(stored)
    assert (document["result"]["exc_module"], document["result"]["exc_type"]) == ("builtins", "TypeError")


async def test_a_celery_clients_time_limit_ends_an_aqueue_task(fleet: Fleet) -> None:
    error, result = await failure_at_celery(fleet, "interop.sleep", 60, time_limit=0.3)
    assert type(error) is TimeLimitExceeded
    assert error.args == (0.3,)
    assert result.state == "FAILURE"


async def test_a_celery_clients_soft_time_limit_ends_an_aqueue_task(fleet: Fleet) -> None:
    error, _ = await failure_at_celery(fleet, "interop.sleep", 60, soft_time_limit=0.3, time_limit=5)
    assert type(error) is SoftTimeLimitExceeded


async def test_a_celery_client_may_read_a_failure_without_raising_it(fleet: Fleet) -> None:
    result = fleet.client.send_task("interop.fail", ["boom"], queue=TO_AQUEUE)
    error = await asyncio.to_thread(result.get, timeout=SOON, propagate=False)
    assert isinstance(error, ValueError)
    assert isinstance(result.result, ValueError)
    assert isinstance(result.info, ValueError)


# --- an aqueue client asks a Celery worker ---------------------------------------------------------------------------


@pytest.fixture
async def app(fleet: Fleet, connect: Connect) -> AQueue:
    return await connect(fleet.site)


async def failure_at_aqueue(app: AQueue, task: str, *args: Any, **options: Any) -> tuple[TaskFailed, AsyncResult[Any]]:
    """What ``get`` raises, and our result."""
    result = await app.send_task(task, args, queue=TO_CELERY, **options)
    with pytest.raises(TaskFailed) as caught:
        await result.get(SOON)
    return caught.value, result


async def test_an_aqueue_client_is_told_the_builtin_exception_that_a_celery_task_raised(app: AQueue) -> None:
    error, result = await failure_at_aqueue(app, "interop.fail", "bööm")
    assert (error.type, error.module, error.message) == ("ValueError", "builtins", "bööm")
    assert error.task_id == result.id
    assert await result.state() == "FAILURE"
    assert await result.failed()
    assert not await result.successful()
    assert await result.ready()


async def test_an_aqueue_client_is_told_every_argument_of_the_exception(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.fail_with_two", "first", 2)
    assert (error.type, error.message) == ("KeyError", "('first', 2)")


async def test_an_aqueue_client_is_told_an_exception_of_the_applications_own(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.decline", "no money", 402)
    assert (error.type, error.module) == ("Declined", "tests.interop.tasks")
    assert error.message == "('no money', 402)"


async def test_an_aqueue_client_is_told_a_class_inside_of_another(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.fail_as_closed", "today")
    assert (error.type, error.module, error.message) == ("Shop.Closed", "tests.interop.tasks", "today")


async def test_an_aqueue_client_is_told_the_document_that_an_exception_holds(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.decline_in_detail", {"amount": ["too much"]})
    assert error.message == "({'amount': ['too much']}, 400)"


async def test_an_aqueue_client_is_told_a_class_that_exists_nowhere_else(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.fail_strangely", "odd")
    assert "Strange" in str(error)
    assert "odd" in error.message


async def test_an_aqueue_client_is_told_of_arguments_that_can_not_be_written(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.fail_with_an_object")
    assert error.type == "ValueError"
    assert "Path" in error.message


async def test_an_aqueue_client_sees_the_traceback_of_a_celery_task(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.decline", "no money", 402)
    assert error.traceback is not None
    assert "raise Declined(reason, code)" in error.traceback
    shown = "".join(traceback.format_exception(error))
    assert "Remote traceback:" in shown
    assert "raise Declined(reason, code)" in shown


async def test_an_aqueue_client_is_told_of_wrong_arguments(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.add", 1)
    assert error.type == "TypeError"
    assert "'y'" in error.message


async def test_an_aqueue_clients_timeout_ends_a_celery_task(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.sleep", 60, timeout=1)
    assert error.type == "TimeLimitExceeded"


async def test_an_aqueue_client_is_told_when_the_celery_worker_does_not_know_the_task(app: AQueue) -> None:
    error, _ = await failure_at_aqueue(app, "interop.nobody_knows_this")
    assert (error.type, error.message) == ("NotRegistered", "interop.nobody_knows_this")
