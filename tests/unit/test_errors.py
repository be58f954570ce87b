"""The tree of errors: what can be caught as what, and what each says."""

import asyncio
import re
from typing import Any

import pytest

import aqueue
from aqueue import errors

#: Lines of the tree in the module's text: what stands before a name says how deep it is.
LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(?: \((?P<builtin>\w+)\))?")


def drawn() -> list[tuple[str, str | None, str | None]]:
    """Name, parent and builtin parent of every error that the module's text draws."""
    found: list[tuple[str, str | None, str | None]] = []
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").partition("::")[2].partition("``ControlFlow``")[0].splitlines():
        match = LINE.match(line)
        if match is not None:
            depth = len(match["indent"])
            path = [(at, name) for at, name in path if at < depth]
            found.append((match["name"], path[-1][1] if path else None, match["builtin"]))
            path.append((depth, match["name"]))
    return found


@pytest.mark.parametrize(("name", "parent", "builtin"), drawn())
def test_the_tree_is_as_it_is_drawn(name: str, parent: str | None, builtin: str | None) -> None:
    kind: type[BaseException] = getattr(errors, name)
    if parent is not None:
        assert issubclass(kind, getattr(errors, parent))
    if builtin is not None:
        assert issubclass(kind, getattr(__import__("builtins"), builtin))


def test_every_error_is_drawn() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert {name for name, _, _ in drawn()} == defined


def test_what_a_task_raises_to_steer_is_not_swallowed_by_its_own_except() -> None:
    for one in (errors.RetryTask(), errors.Reject(), errors.Ignore(), errors.Snooze(1), errors.Dead()):
        with pytest.raises(type(one)):
            try:
                raise one
            except Exception:
                pytest.fail("swallowed")


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), 1e12, "soon", None])
def test_a_snooze_is_for_a_number_of_seconds(after: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="after is a number of seconds"):
        errors.Snooze(after)


def test_a_timeout_of_a_result_is_a_timeout() -> None:
    assert issubclass(errors.ResultTimeout, asyncio.TimeoutError)


def test_a_failed_task_tells_the_remote_error_and_its_traceback() -> None:
    error = errors.TaskFailed("1", "ValueError", "boom", "builtins", "Traceback...\nValueError: boom\n")
    assert str(error) == "ValueError: boom\n\nRemote traceback:\nTraceback...\nValueError: boom"
    assert (error.task_id, error.type, error.message, error.module) == ("1", "ValueError", "boom", "builtins")
    assert str(errors.TaskFailed("1", "ValueError", "boom")) == "ValueError: boom"
    assert str(errors.TaskFailed("1", "ValueError", "")) == "ValueError"


def test_a_revoked_task_tells_why() -> None:
    assert str(errors.TaskRevoked("1", "expired")) == "task 1 did not run to its end: expired"


def test_a_send_that_may_have_happened_carries_its_ids() -> None:
    assert errors.EnqueueUnknown("gone", ["1", "2"]).ids == ("1", "2")
    assert errors.EnqueueUnknown("gone").ids == ()


def test_a_refused_send_says_which() -> None:
    assert errors.EnqueueFailed("no").refused is None
    assert errors.EnqueueFailed("no", {1: "why"}).refused == {1: "why"}


@pytest.mark.parametrize("name", [name for name in aqueue.__all__ if isinstance(getattr(aqueue, name), type)])
def test_errors_users_meet_are_at_the_top_of_the_package(name: str) -> None:
    kind: Any = getattr(aqueue, name)
    if issubclass(kind, BaseException):
        assert getattr(errors, name) is kind
