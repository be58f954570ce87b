"""RabbitMQ's URLs: every form that Celery's users write, and one line for what a URL can't mean."""

import ssl
from pathlib import Path

import pytest

from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.errors import ConfigurationError
from aqueue.url import Url
from tests.kit.certificates import make_certificates
from tests.unit.elements import error_of

SECRET = "s3cr3t"


def parse(text: str) -> AmqpAddress:
    return AmqpAddress.parse(Url(text))


def mistake(text: str) -> str:
    """What a URL that can't work is told to be; one line, without its password."""
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    told = str(caught.value)
    assert "\n" not in told
    assert SECRET not in told
    return told


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("amqp://", "localhost", 5672),
        ("amqp:///vhost", "localhost", 5672),
        ("amqp://host", "host", 5672),
        ("amqp://HOST:7000//", "host", 7000),
        ("amqps://host", "host", 5671),
        ("amqps://host:7000", "host", 7000),
        ("pyamqp://host", "host", 5672),
        ("librabbitmq://guest@host//", "host", 5672),
        ("AMQP://host", "host", 5672),
        ("amqp://[::1]:7000/v", "::1", 7000),
        ("amqp://[fe80::1%25eth0]/v", "fe80::1%eth0", 5672),
    ],
)
def test_host_and_port_are_read(text: str, host: str, port: int) -> None:
    assert parse(text).hosts == ((host, port),)


@pytest.mark.parametrize(
    ("path", "virtual_host"),
    [
        ("", "/"),
        ("/", "/"),
        ("//", "/"),
        ("/%2F", "/"),
        ("/%2f", "/"),
        ("/name", "name"),
        ("//name", "/name"),
        ("/%2Fname", "/name"),
        ("/a%20b", "a b"),
        ("/a/b", "a/b"),
        ("/gr%C3%B6%C3%9Fe", "größe"),
    ],
)
@pytest.mark.parametrize("query", ["", "?heartbeat=5"])
def test_a_virtual_host_is_the_path_behind_its_slash(path: str, virtual_host: str, query: str) -> None:
    assert parse(f"amqp://user:pw@host{path}{query}").virtual_host == virtual_host


@pytest.mark.parametrize(
    ("text", "user", "password"),
    [
        ("amqp://host", "guest", "guest"),
        ("amqp://user@host", "user", "guest"),
        ("amqp://user:s3cr3t@host", "user", "s3cr3t"),
        ("amqp://us%40er:p%3A%2F%40%25@host", "us@er", "p:/@%"),
        ("amqp://user:a@b@host", "user", "a@b"),
        ("amqp://user:a%3Bb@host", "user", "a;b"),
        ("amqp://:s3cr3t@host", "guest", "s3cr3t"),
    ],
)
def test_user_and_password_are_read_without_escapes(text: str, user: str, password: str) -> None:
    found = parse(text)
    assert (found.username, found.password) == (user, password)


def test_several_hosts_are_tried_in_turn() -> None:
    found = parse("amqp://u:s3cr3t@a//v;amqp://u:s3cr3t@b:7;amqp://u:s3cr3t@[::1]//v?heartbeat=4")
    assert found.hosts == (("a", 5672), ("b", 7), ("::1", 5672))
    assert (found.virtual_host, found.username, found.password, found.heartbeat) == ("/v", "u", "s3cr3t", 4.0)


def test_several_hosts_over_tls_have_its_port() -> None:
    assert parse("amqps://a;amqps://b:1").hosts == (("a", 5671), ("b", 1))


def test_parameters_are_read() -> None:
    found = parse("amqp://host?heartbeat=2.5&connection_timeout=3&name=web&auth_mechanism=EXTERNAL")
    assert (found.heartbeat, found.connect_timeout, found.name, found.mechanism) == (2.5, 3.0, "web", "EXTERNAL")
    found = parse("amqp://host")
    assert (found.heartbeat, found.connect_timeout, found.name, found.mechanism) == (None, 5.0, "", "PLAIN")
    assert parse("amqp://host?heartbeat=0").heartbeat == 0.0


def test_without_amqps_there_is_no_tls() -> None:
    assert parse("amqp://host?ssl_ca_certs=/ca").ssl_context() is None


@pytest.mark.parametrize(
    ("query", "verify_mode", "check_hostname"),
    [
        ("", ssl.CERT_REQUIRED, True),
        ("?verify=verify_peer", ssl.CERT_REQUIRED, True),
        ("?verify=verify_none", ssl.CERT_NONE, False),
        ("?ssl_cert_reqs=CERT_NONE", ssl.CERT_NONE, False),
        ("?ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("?ssl_cert_reqs=CERT_REQUIRED", ssl.CERT_REQUIRED, True),
        ("?ssl_check_hostname=false", ssl.CERT_REQUIRED, False),
    ],
)
def test_tls_is_checked_unless_the_url_says_otherwise(
    query: str, verify_mode: ssl.VerifyMode, check_hostname: bool
) -> None:
    context = parse(f"amqps://host{query}").ssl_context()
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (verify_mode, check_hostname)


@pytest.mark.parametrize(
    "names", [("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"), ("cacertfile", "certfile", "keyfile")]
)
def test_files_for_tls_have_the_names_of_kombu_or_of_rabbitmq(tmp_path: Path, names: tuple[str, str, str]) -> None:
    files = make_certificates(tmp_path)
    paths = (files["ca-cert-file"], files["cert-file"], files["key-file"])
    query = "&".join(f"{name}={path}" for name, path in zip(names, paths, strict=True))
    context = parse(f"amqps://host?{query}").ssl_context()
    assert context is not None
    assert any("Test authority" in str(one) for one in context.get_ca_certs())


def test_files_that_are_missing_are_told_without_the_password() -> None:
    address = parse("amqps://user:s3cr3t@host?cacertfile=/nowhere/ca.pem")
    with pytest.raises(ConfigurationError, match="certificates") as caught:
        address.ssl_context()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "amqp://user:s3cr3t@host:port",
        "amqp://user:s3cr3t@host:99999",
        "amqp://user:s3cr3t@:7",
        "amqp://user:s3cr3t@[::1/v",
        "amqp://user:s3cr3t@host?heartbeat=often",
        "amqp://user:s3cr3t@host?heartbeat=-1",
        "amqp://user:s3cr3t@host?heartbeat=nan",
        "amqp://user:s3cr3t@host?connection_timeout=inf",
        "amqp://user:s3cr3t@host?auth_mechanism=GSSAPI",
        "amqp://user:s3cr3t@host?colour=red",
    ],
)
def test_what_a_url_cannot_mean_is_told_in_one_line(text: str) -> None:
    mistake(text)


def test_an_unknown_parameter_is_named_beside_those_that_are_known() -> None:
    told = mistake("amqp://host?colour=red")
    assert "unknown parameter colour" in told
    assert "heartbeat" in told
    assert "cacertfile" in told


@pytest.mark.parametrize(
    "text",
    [
        "amqp://user:s3cr3t/more@host//",
        "amqp://user:more/s3cr3t@host//",
        "amqp://user:s3cr3t?more@host//",
        "amqp://user:s3cr3t#more@host//",
        "amqp://user:12/s3cr3t@host//",
        "amqp://user:more;s3cr3t@host//",
        "amqp://a:s3cr3t@x;amqp://b:s3cr3t/y@z",
        "amqp://user:s3cr3t\u2100@host//",
    ],
)
def test_a_password_with_unescaped_characters_is_not_told(text: str) -> None:
    error = error_of(ConfigurationError, lambda: parse(text))
    assert SECRET not in (repr(parse(text)) if error is None else str(error))


@pytest.mark.parametrize("text", ["amqp://user:s3cr3t@host//", "amqp://a:s3cr3t@x//;amqp://b:s3cr3t@y//?heartbeat=2"])
def test_an_address_does_not_show_its_password(text: str) -> None:
    found = parse(text)
    for shown in (repr(found), str(found), found.shown):
        assert SECRET not in shown
    assert "***" in found.shown
