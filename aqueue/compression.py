"""Compressors of the Celery wire (celery-protocol 1.11), with bounded decompression.

A message names its compressor in the header ``compression``. ``gzip`` is a zlib stream (RFC 1950), not
a gzip file. Peers decompress without a limit; here nothing is expanded past the limit given, so that a
few bytes can't fill the memory of a worker.
"""

import zlib
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from aqueue.errors import BadMessage, ConfigurationError

GZIP = "application/x-gzip"
BZIP2 = "application/x-bz2"
LZMA = "application/x-lzma"
BROTLI = "application/x-brotli"
ZSTD = "application/zstd"

#: Every name a sender may write, with the content type that travels.
CONTENT_TYPES = {
    "gzip": GZIP, "zlib": GZIP,
    "bzip2": BZIP2, "bzip": BZIP2,
    "lzma": LZMA, "xz": LZMA,
    "brotli": BROTLI,
    "zstd": ZSTD, "zstandard": ZSTD,
}  # fmt: skip


#: Bytes that a stream may ask for its dictionary; the strongest preset of senders takes 65 MiB.
_LZMA_MEMORY = 100 * 1024 * 1024


class _Stream(Protocol):
    """The decompressor objects of bz2, lzma and zstd."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


def content_type(name: str) -> str:
    """The content type for a compressor's name or content type. Raises ConfigurationError."""
    if name in CONTENT_TYPES:
        return CONTENT_TYPES[name]
    if name in CONTENT_TYPES.values():
        return name
    raise ConfigurationError(f"unknown compression {name!r}; use one of {', '.join(sorted(CONTENT_TYPES))}")


def compress(data: bytes, name: str) -> tuple[bytes, str]:
    """The compressed bytes, and the content type to put into the header. Raises ConfigurationError."""
    kind = content_type(name)
    return _COMPRESSORS[kind](data), kind


def decompress(data: bytes, name: str, limit: int) -> bytes:
    """Expand ``data`` to at most ``limit`` bytes.

    Raises BadMessage ``too_large`` past the limit, ``bad_compression`` for a compressor that is unknown
    or not installed, a damaged or truncated stream, or bytes behind its end.
    """
    kind = CONTENT_TYPES.get(name, name)
    if kind not in _DECOMPRESSORS:
        raise BadMessage("bad_compression", f"unknown compression {name[:80]!r}")
    try:
        return _DECOMPRESSORS[kind](data, limit)
    except BadMessage:
        raise
    except Exception as error:  # each driver has errors of its own
        raise BadMessage("bad_compression", f"{name}: {error}") from error


def _optional(*modules: str, extra: str) -> ModuleType:
    for module in modules:
        try:
            return import_module(module)
        except ImportError:
            continue
    raise ConfigurationError(f"compression {extra!r} needs a package that is missing: pip install 'aqueue[{extra}]'")


def _zstd() -> Any:
    return _optional("compression.zstd", "backports.zstd", extra="zstd")


def _brotli() -> Any:
    return _optional("brotli", "brotlicffi", extra="brotli")


def _too_large(limit: int) -> BadMessage:
    return BadMessage("too_large", f"decompressed body is over {limit} bytes")


def _from_stream(stream: _Stream, data: bytes, limit: int) -> bytes:
    out = stream.decompress(data, limit + 1)
    if len(out) > limit:
        raise _too_large(limit)
    if not stream.eof:
        raise ValueError("the stream ends early")
    if stream.unused_data:
        raise ValueError("there are bytes behind the end of the stream")
    return out


class _Zlib:
    """zlib's decompressor with the interface of its siblings."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(data, max_length)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data


def _from_brotli(data: bytes, limit: int) -> bytes:
    brotli = _brotli()
    stream = brotli.Decompressor()
    try:
        out: bytes = stream.process(data, output_buffer_limit=limit + 1)
        if len(out) > limit:
            raise _too_large(limit)
        if not stream.is_finished():
            raise ValueError("the stream ends early")
    except brotli.error as error:
        raise ValueError(str(error)) from error
    return out


def _from_zstd(data: bytes, limit: int) -> bytes:
    zstd = _zstd()
    try:
        return _from_stream(zstd.ZstdDecompressor(), data, limit)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from error


_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    GZIP: zlib.compress,
    BZIP2: lambda data: bytes(import_module("bz2").compress(data)),
    LZMA: lambda data: bytes(import_module("lzma").compress(data)),
    BROTLI: lambda data: bytes(_brotli().compress(data)),
    ZSTD: lambda data: bytes(_zstd().compress(data)),
}

_DECOMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    GZIP: lambda data, limit: _from_stream(_Zlib(), data, limit),
    BZIP2: lambda data, limit: _from_stream(import_module("bz2").BZ2Decompressor(), data, limit),
    LZMA: lambda data, limit: _from_stream(import_module("lzma").LZMADecompressor(memlimit=_LZMA_MEMORY), data, limit),
    BROTLI: _from_brotli,
    ZSTD: _from_zstd,
}
