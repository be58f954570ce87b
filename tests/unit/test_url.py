"""Connection URLs: no text of one shows its password, however it was written."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.errors import ConfigurationError
from aqueue.url import Url, mask

SECRET = "s3cr3t"

#: URLs with the secret in them, and what is to be seen of each.
WITH_SECRETS = {
    "redis://user:s3cr3t@host:6379/0": "redis://user:***@host:6379/0",
    "redis://:s3cr3t@host": "redis://:***@host",
    "redis://user:s3cr3t@[::1]:6379/0": "redis://user:***@[::1]:6379/0",
    "redis://user:%40s3cr3t%2F@host": "redis://user:***@host",
    "redis://user:a@s3cr3t@host": "redis://user:***@host",
    "redis://user:a/s3cr3t@host": "redis://user:***@host",
    "redis://user:a:s3cr3t@host": "redis://user:***@host",
    "redis://user:a?s3cr3t#b@host": "redis://user:***@host",
    "redis+socket://:s3cr3t@/tmp/redis.sock": "redis+socket://:***@/tmp/redis.sock",
    "redis://host/0?password=s3cr3t": "redis://host/0?password=***",
    "redis://host/0?db=1&SSL_Password=s3cr3t&x=1": "redis://host/0?db=1&SSL_Password=***&x=1",
    "sentinel://:s3cr3t@a:1;sentinel://:s3cr3t@b:2/0?sentinel_password=s3cr3t": (
        "sentinel://:***@a:1;sentinel://:***@b:2/0?sentinel_password=***"
    ),
    "s3://bucket/?region=here&access_key_id=me&secret_access_key=a/s3cr3t+x&session_token=s3cr3t": (
        "s3://bucket/?region=here&access_key_id=me&secret_access_key=***&session_token=***"
    ),
    "azureblockblob://AccountName=me;AccountKey=s3cr3t==;EndpointSuffix=core.windows.net?container_name=x": (
        "azureblockblob://AccountName=me;AccountKey=***;EndpointSuffix=core.windows.net?container_name=x"
    ),
    "azureblockblob://BlobEndpoint=https://me.net;SharedAccessSignature=sv=2&sig=s3cr3t": (
        "azureblockblob://BlobEndpoint=https://me.net;SharedAccessSignature=***"
    ),
    "https://host?access_token=s3cr3t&client_secret=s3cr3t": "https://host?access_token=***&client_secret=***",
}


@pytest.mark.parametrize(("text", "shown"), WITH_SECRETS.items())
def test_a_password_is_masked_and_nothing_else(text: str, shown: str) -> None:
    assert mask(text) == shown
    url = Url(text)
    assert str(url) == shown
    assert f"{url}" == shown
    assert f"{url!r}" == f"Url({shown!r})"
    assert "%s" % url == shown  # noqa: UP031


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:s3cr3t;more@host/0",
        "redis://user:a;s3cr3t@host/0",
        "redis://me@example.com:s3cr3t@host/0",
        "redis://me/you:s3cr3t@host/0",
        "redis://a,b:s3cr3t@host/0",
        "redis://user:s3cr3t@host,redis://user:s3cr3t@other",
        "redis://host/0?password=a;s3cr3t",
        "amqp://user:s3cr3t@a//;amqp://user:s3cr3t@b//",
    ],
)
def test_a_password_is_masked_however_it_is_written(text: str) -> None:
    assert SECRET not in mask(text)
    assert SECRET not in str(Url(text))


@pytest.mark.parametrize(
    "text", ["redis://host:6379/0", "memory://", "sqlite:///a@b:c.db", "redis://user@host/0", "redis://host/0?db=1"]
)
def test_a_url_without_a_password_is_shown_as_it_is(text: str) -> None:
    assert str(Url(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "localhost:6379", "://host", "redis:/host", "1redis://host", "user:s3cr3t@host", "re dis://host"],
)
def test_what_is_no_url_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"is no URL; expected something like redis://localhost:6379/0"
    ) as caught:
        Url(text)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:s3cr3t@[::1",
        "redis://user:s3cr3t\u2100@host",
        "redis://user:s3cr3t@ho\u2100st",
        "redis://u:s3cr3t@[x]/0",
    ],
)
def test_an_error_about_a_url_does_not_tell_its_password(text: str) -> None:
    try:
        shown = str(Url(text))
    except ConfigurationError as error:
        shown = str(error)
        assert "\n" not in shown
    assert SECRET not in shown


def test_a_url_knows_its_scheme_path_and_parameters() -> None:
    url = Url("REDISS://host/a%20b/2?db=3&name=x%26y&db=4&empty=")
    assert url.scheme == "rediss"
    assert url.path == "/a b/2"
    assert url.query == {"db": "3", "name": "x&y"}


def test_the_whole_url_is_given_only_when_it_is_asked_for() -> None:
    text = "redis://user:s3cr3t@host"
    assert Url(text).reveal() == text


def test_urls_are_compared_whole() -> None:
    assert Url("redis://a:x@host") == Url("redis://a:x@host")
    assert Url("redis://a:x@host") != Url("redis://a:y@host")
    assert Url("redis://host") != "redis://host"
    assert len({Url("redis://a:x@host"), Url("redis://a:x@host"), Url("redis://a:y@host")}) == 2


def test_a_url_is_not_pickled_or_copied_by_accident() -> None:
    with pytest.raises(TypeError, match="reveal"):
        pickle.dumps(Url("redis://a:x@host"))
    with pytest.raises(TypeError, match="reveal"):
        copy.copy(Url("redis://a:x@host"))


def test_a_url_has_no_attributes_that_show_it() -> None:
    with pytest.raises(TypeError):
        vars(Url("redis://a:x@host"))


@given(
    before=st.text("abc@:/?#%;,&= ", max_size=5),
    after=st.text("abc@:/?#%;,&= ", max_size=5),
    user=st.sampled_from(["", "user", "me@example.com", "us/er"]),
)
@settings(max_examples=100, deadline=None)
def test_a_password_of_any_characters_is_masked(before: str, after: str, user: str) -> None:
    text = f"redis://{user}:{before}{SECRET}{after}@host:6379/0"
    assert SECRET not in mask(text)
    try:
        shown = repr(Url(text))
    except ConfigurationError as error:
        shown = str(error)
    assert SECRET not in shown
