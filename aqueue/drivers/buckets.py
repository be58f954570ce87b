"""Folders, buckets and containers, opened by the URLs that Celery has for them.

Keys that a URL does not hold are taken from the environment, as the service's own tools do.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store

from aqueue.errors import ConfigurationError
from aqueue.url import Url, mask

#: obstore's own retries of a request that failed, within the time of the call.
_RETRIES: Final[Any] = {"max_retries": 2}


class Bucket(NamedTuple):
    """Where objects lie: a service with its credentials, and what stands before the name of each."""

    store: ObjectStore
    base: str
    #: The URL without its secrets.
    shown: str
    #: Whether an object can be seen while somebody else is in the midst of writing it.
    torn: bool


def open_bucket(url: Url) -> Bucket:
    """What a URL names. Raises ConfigurationError, which never shows a secret."""
    make, known = _SERVICES[url.scheme]
    if unknown := set(url.query) - known - {"key_prefix"}:
        raise ConfigurationError(
            f"{url}: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(known | {'key_prefix'}))}"
        )
    try:
        store, base = make(url)
    except ConfigurationError:
        raise
    except (BaseError, OSError, ValueError) as error:  # what a driver makes of a bad key or an unwritable folder
        raise ConfigurationError(f"{url} can't be used: {sentence(error)}") from None
    return Bucket(store, base, str(url), torn=isinstance(store, LocalStore))


def _rest(url: Url) -> str:
    """What stands between ``://`` and the query, as it was written."""
    return url.reveal().partition("://")[2].partition("?")[0]


def _host_and_path(url: Url) -> tuple[str, str]:
    host, _, path = _rest(url).partition("/")
    if not host or "@" in host or ":" in host:
        raise ConfigurationError(
            f"{url} names no bucket; expected something like {url.scheme}://bucket/folder/?region=..."
        )
    return host, path


def _given(url: Url, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings of obstore's, by our names for them."""
    return {theirs: url.query[ours] for ours, theirs in names.items() if ours in url.query}


def _client_options(endpoint: str) -> Any:
    """Plain HTTP only where the URL says so: in an emulator, or inside a cluster."""
    return {"allow_http": endpoint.startswith("http://")}


def _files(url: Url) -> tuple[ObjectStore, str]:
    """``file:///folder/`` and ``file://localhost/folder/``; Celery takes the path as it is written, too."""
    path = _rest(url)
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    if not path:
        raise ConfigurationError(f"{url} names no folder; expected something like file:///var/lib/results/")
    return LocalStore(Path(path).absolute(), mkdir=True), ""


_S3_NAMES: Final = {
    "access_key_id": "access_key_id",
    "conditional_put": "conditional_put",
    "endpoint_url": "endpoint",
    "region": "region",
    "secret_access_key": "secret_access_key",
    "session_token": "session_token",
}


def _s3(url: Url) -> tuple[ObjectStore, str]:
    """``s3://bucket/base_path``, which is Celery's ``s3_bucket`` and ``s3_base_path``: no slash is added."""
    bucket, base = _host_and_path(url)
    # No key holds a space: it was a + that nobody escaped.
    config: Any = {name: value.replace(" ", "+") for name, value in _given(url, _S3_NAMES).items()}
    options = _client_options(config.get("endpoint", ""))
    return S3Store(bucket, config=config, client_options=options, retry_config=_RETRIES), base


_GCS_NAMES: Final = {"endpoint_url": "base_url", "service_account": "service_account", "anonymous": "skip_signature"}
#: What Celery's URL may say besides: it is about its own client and its chords.
_GCS_IGNORED: Final = ("gcs_project", "gcs_ttl", "gcs_threadpool_maxsize", "firestore_project")


def _gcs(url: Url) -> tuple[ObjectStore, str]:
    """``gs://bucket/base/path``, as Celery has it: one slash between the path and the name."""
    bucket, path = _host_and_path(url)
    base = path.strip("/")
    config: Any = _given(url, _GCS_NAMES)
    options = _client_options(config.get("base_url", ""))
    store = GCSStore(bucket, config=config, client_options=options, retry_config=_RETRIES)
    return store, f"{base}/" if base else ""


def _azure(url: Url) -> tuple[ObjectStore, str]:
    """``azureblockblob://`` and a connection string, or ``DefaultAzureCredential@`` and the account's URL."""
    text = _rest(url)
    credential, at, account_url = text.partition("@")
    if at and credential in ("DefaultAzureCredential", "ManagedIdentityCredential"):
        config: Any = {"endpoint": account_url, "account_name": _account(account_url)}
    else:
        config = _connection_string(text, url)
    options = _client_options(config.get("endpoint", ""))
    container = url.query.get("container_name", "celery")
    base = url.query.get("base_path", "")
    return AzureStore(container, config=config, client_options=options, retry_config=_RETRIES), base


def _account(endpoint: str) -> str:
    """``name`` of ``https://name.blob.core.windows.net``."""
    return (urlsplit(endpoint).hostname or "").partition(".")[0]


def _connection_string(text: str, url: Url) -> Any:
    pairs = (part.partition("=") for part in text.split(";") if part)
    found = {key.strip().lower(): value for key, _, value in pairs}
    if found.get("usedevelopmentstorage", "").lower() == "true":
        return {"use_emulator": True, "endpoint": "http://127.0.0.1:10000/devstoreaccount1"}
    name, key, signature = (found.get(part, "") for part in ("accountname", "accountkey", "sharedaccesssignature"))
    endpoint = found.get("blobendpoint", "")
    if not endpoint and name:
        protocol = found.get("defaultendpointsprotocol", "https")
        endpoint = f"{protocol}://{name}.blob.{found.get('endpointsuffix', 'core.windows.net')}"
    if not endpoint or not (key or signature):
        raise ConfigurationError(
            f"{url}: expected a connection string with AccountName or BlobEndpoint,"
            " and AccountKey or SharedAccessSignature; or DefaultAzureCredential@ and the account's URL"
        )
    name = name or _account(endpoint)
    config = {"account_name": name, "endpoint": endpoint.rstrip("/")}
    return config | ({"account_key": key} if key else {"sas_key": signature.removeprefix("?")})


#: How to open what a scheme names, and which parameters it knows.
_SERVICES: Final[dict[str, tuple[Callable[[Url], tuple[ObjectStore, str]], frozenset[str]]]] = {
    "file": (_files, frozenset()),
    "s3": (_s3, frozenset(_S3_NAMES)),
    "gs": (_gcs, frozenset((*_GCS_NAMES, *_GCS_IGNORED))),
    "azureblockblob": (_azure, frozenset(("container_name", "base_path"))),
}


def sentence(error: Exception) -> str:
    """What obstore says, in one line, without the query of a URL: it may be signed."""
    lines = str(error).splitlines() or [type(error).__name__]
    return mask(re.sub(r"\?\S*", "", lines[0]))[:500]
