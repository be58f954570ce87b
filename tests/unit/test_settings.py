"""Settings of an app: the defaults that a Celery fleet expects, and values that can't work."""

import math
from typing import Any

import pytest

from aqueue import ConfigurationError, Settings
from aqueue.serialization import Limits


def test_the_defaults_are_what_a_celery_fleet_expects() -> None:
    settings = Settings()
    assert settings.default_queue == "celery"
    assert (settings.serializer, settings.result_serializer) == ("json", "json")
    assert list(settings.accept_content) == ["json"]
    assert settings.compression is None
    assert settings.result_compression is None
    assert settings.result_expires == 86400
    assert settings.ignore_result is False
    assert settings.result_extended is False
    assert settings.track_started is False


def test_by_default_nothing_unsafe_is_accepted() -> None:
    assert "pickle" not in Settings().accept_content
    assert Settings().limits == Limits(message=1024 * 1024, decompressed=16 * 1024 * 1024, headers=64 * 1024, depth=200)


@pytest.mark.parametrize("priority", [-1, 10, 100])
def test_a_default_priority_is_from_0_to_9(priority: int) -> None:
    with pytest.raises(ConfigurationError, match="default_priority is 0 to 9"):
        Settings(default_priority=priority)


@pytest.mark.parametrize("priority", range(10))
def test_every_priority_may_be_the_default(priority: int) -> None:
    assert Settings(default_priority=priority).default_priority == priority


@pytest.mark.parametrize("name", ["send_timeout", "lease", "timeout", "kill_after"])
@pytest.mark.parametrize("seconds", [0, -1, -0.5])
def test_times_are_over_nothing(name: str, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Settings(**{name: seconds})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["send_timeout", "lease", "timeout", "kill_after"])
def test_times_are_numbers(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Settings(**{name: math.nan})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_deliveries", "process_max_tasks", "process_max_memory"])
@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3"])
def test_counts_are_integers_over_nothing(name: str, count: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is an integer, 1 or more"):
        Settings(**{name: count})


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().lease = 5  # type: ignore[misc]


def test_settings_are_given_by_name() -> None:
    positional: Any = Settings
    with pytest.raises(TypeError):
        positional("celery")


def test_apps_do_not_share_their_routes() -> None:
    assert Settings().routes is not Settings().routes
