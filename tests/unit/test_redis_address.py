"""Redis URLs: every form that Celery's users write, and one line for what a URL can't mean."""

import ssl
from typing import Any

import pytest

from aqueue.drivers.redis_address import RedisAddress
from aqueue.errors import ConfigurationError
from aqueue.url import Url
from tests.unit.elements import error_of

SECRET = "s3cr3t"


def parse(text: str) -> RedisAddress:
    return RedisAddress.parse(Url(text))


def mistake(text: str) -> str:
    """What a URL that can't work is told to be; one line, without its password."""
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    told = str(caught.value)
    assert "\n" not in told
    assert SECRET not in told
    return told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://", ("localhost", 6379, 0)),
        ("redis:///2", ("localhost", 6379, 2)),
        ("redis://host", ("host", 6379, 0)),
        ("redis://host/", ("host", 6379, 0)),
        ("redis://host:7000/3", ("host", 7000, 3)),
        ("redis://host?db=4", ("host", 6379, 4)),
        ("redis://host/3?db=4", ("host", 6379, 4)),
        ("redis://host?virtual_host=5", ("host", 6379, 5)),
        ("redis://[::1]:7000/1", ("::1", 7000, 1)),
        ("redis://[fe80::1%25eth0]/1", ("fe80::1%eth0", 6379, 1)),
        ("redis://10.0.0.1", ("10.0.0.1", 6379, 0)),
        ("REDIS://host/1", ("host", 6379, 1)),
    ],
)
def test_host_port_and_database_are_read(text: str, expected: tuple[str, int, int]) -> None:
    found = parse(text)
    assert (found.host, found.port, found.db) == expected
    assert found.path == ""
    assert found.tls is None


@pytest.mark.parametrize(
    ("text", "user", "password"),
    [
        ("redis://host", None, None),
        ("redis://:s3cr3t@host", None, "s3cr3t"),
        ("redis://user:s3cr3t@host", "user", "s3cr3t"),
        ("redis://user@host", "user", None),
        ("redis://us%40er:p%3A%2F%40%25@host", "us@er", "p:/@%"),
        ("redis://:a@b@host", None, "a@b"),
        ("redis+socket://:s3cr3t@/tmp/redis.sock", None, "s3cr3t"),
        ("rediss://user:s3cr3t@host", "user", "s3cr3t"),
    ],
)
def test_user_and_password_are_read_without_escapes(text: str, user: str | None, password: str | None) -> None:
    found = parse(text)
    assert (found.username, found.password) == (user, password)


@pytest.mark.parametrize(
    ("text", "path", "db"),
    [
        ("redis+socket:///tmp/redis.sock", "/tmp/redis.sock", 0),
        ("unix:///var/run/redis.sock", "/var/run/redis.sock", 0),
        ("redis+socket:///tmp/redis.sock?virtual_host=2", "/tmp/redis.sock", 2),
        ("unix:///tmp/redis.sock?db=3", "/tmp/redis.sock", 3),
        ("unix:///tmp/a%20b.sock", "/tmp/a b.sock", 0),
    ],
)
def test_a_socket_is_a_path(text: str, path: str, db: int) -> None:
    found = parse(text)
    assert (found.path, found.db) == (path, db)


@pytest.mark.parametrize("text", ["redis+socket://", "unix://", "unix://?db=1", "redis+socket://tmp/redis.sock"])
def test_a_socket_without_a_path_from_the_root_is_a_mistake(text: str) -> None:
    """Not another server, reached over TCP, and not another path."""
    mistake(text)


def test_sentinels_are_listed_and_the_master_named() -> None:
    found = parse("sentinel://:s3cr3t@a:1;sentinel://b:2;sentinel://c/2?master_name=mymaster&sentinel_password=x")
    assert found.sentinels == (("a", 1), ("b", 2), ("c", 26379))
    assert (found.master_name, found.db, found.password) == ("mymaster", 2, "s3cr3t")
    assert found.sentinel_auth == {"password": "x"}


def test_one_sentinel_is_enough() -> None:
    assert parse("redis+sentinel://a?master_name=m&sentinel_username=u").sentinels == (("a", 26379),)


def test_sentinels_without_a_master_are_a_mistake_that_says_what_to_add() -> None:
    assert "?master_name=mymaster" in mistake("sentinel://:s3cr3t@a:1;sentinel://b:2")


def test_tls_is_checked_unless_the_url_says_otherwise() -> None:
    tls = parse("rediss://host").tls
    assert tls is not None
    assert tls["ssl_cert_reqs"] == ssl.CERT_REQUIRED
    assert tls["ssl_check_hostname"] is True


@pytest.mark.parametrize(
    ("query", "cert_reqs", "check_hostname"),
    [
        ("ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("ssl_cert_reqs=CERT_NONE", ssl.CERT_NONE, False),
        ("ssl_cert_reqs=optional", ssl.CERT_OPTIONAL, False),
        ("ssl_cert_reqs=CERT_REQUIRED", ssl.CERT_REQUIRED, True),
        ("ssl_check_hostname=false", ssl.CERT_REQUIRED, False),
        ("ssl_check_hostname=0", ssl.CERT_REQUIRED, False),
        ("ssl_check_hostname=true", ssl.CERT_REQUIRED, True),
    ],
)
def test_tls_may_be_checked_less(query: str, cert_reqs: ssl.VerifyMode, check_hostname: bool) -> None:
    tls: Any = parse(f"rediss://host?{query}").tls
    assert (tls["ssl_cert_reqs"], tls["ssl_check_hostname"]) == (cert_reqs, check_hostname)


def test_files_for_tls_are_passed_on() -> None:
    tls: Any = parse("rediss://host?ssl_ca_certs=/ca&ssl_certfile=/c&ssl_keyfile=/k").tls
    assert (tls["ssl_ca_certs"], tls["ssl_certfile"], tls["ssl_keyfile"]) == ("/ca", "/c", "/k")


def test_an_unknown_check_of_tls_is_a_mistake() -> None:
    assert "none, optional, required" in mistake("rediss://host?ssl_cert_reqs=maybe")


def test_a_prefix_and_a_client_name_are_read() -> None:
    found = parse("redis://host?key_prefix=myapp%3A&client_name=web")
    assert (found.key_prefix, found.client_name) == ("myapp:", "web")


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:s3cr3t@host/celery",
        "redis://user:s3cr3t@host/-1",
        "redis://user:s3cr3t@host/0/1",
        "redis://user:s3cr3t@host/\u00b2",
        "redis://user:s3cr3t@host:port/0",
        "redis://user:s3cr3t@host:99999/0",
        "redis://user:s3cr3t@host:-1/0",
        "redis://user:s3cr3t@host/0?db=one",
        "redis://user:s3cr3t@host/0?colour=red",
        "redis://user:s3cr3t@host/0?db=1&retry=5&speed=7",
        "redis://user:s3cr3t@[::1/0",
    ],
)
def test_what_a_url_cannot_mean_is_told_in_one_line(text: str) -> None:
    mistake(text)


def test_an_unknown_parameter_is_named_beside_those_that_are_known() -> None:
    told = mistake("redis://host/0?colour=red&dn=1")
    assert "unknown parameter colour, dn" in told
    assert "key_prefix" in told


@pytest.mark.parametrize(
    "text",
    [
        "redis://:s3cr3t/more@host/0",
        "redis://:more/s3cr3t@host/0",
        "redis://:s3cr3t?more@host/0",
        "redis://:more?s3cr3t=1@host/0",
        "redis://:s3cr3t#more@host/0",
        "redis://user:12/s3cr3t@host/0",
        "redis://user:s3cr3t\u2100@host/0",
        "redis://user:more;s3cr3t@host/0",
        "redis://me@example.com:s3cr3t@host/x",
        "sentinel://:s3cr3t/more@a:1;sentinel://b:2?master_name=m",
    ],
)
def test_a_password_with_unescaped_characters_is_not_told_by_the_error(text: str) -> None:
    error = error_of(ConfigurationError, lambda: parse(text))
    assert SECRET not in (repr(parse(text)) if error is None else str(error))


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:s3cr3t@host",
        "rediss://:s3cr3t@host",
        "sentinel://:s3cr3t@a?master_name=m&sentinel_password=s3cr3t",
    ],
)
def test_an_address_does_not_show_its_passwords(text: str) -> None:
    found = parse(text)
    assert SECRET not in repr(found)
    assert SECRET not in str(found)
    assert SECRET not in found.shown
    assert "host" in found.shown or "sentinel" in found.shown


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("redis://host", "redis://user:s3cr3t@host:6379/0?client_name=x", True),
        ("redis://host", "rediss://host", True),
        ("redis://host/0", "redis://host/1", False),
        ("redis://host", "redis://other", False),
        ("redis://host:1", "redis://host:2", False),
        ("unix:///a", "unix:///b", False),
        ("unix:///a", "redis+socket:///a?virtual_host=0", True),
        ("sentinel://a?master_name=m", "sentinel://a?master_name=m", True),
        ("sentinel://a?master_name=m", "sentinel://a?master_name=n", False),
    ],
)
def test_two_urls_may_lead_to_the_same_database(one: str, other: str, same: bool) -> None:
    assert parse(one).same_database(parse(other)) is same
    assert parse(other).same_database(parse(one)) is same
