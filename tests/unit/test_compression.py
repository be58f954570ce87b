"""Compressors of the wire: the captured streams, streams that are damaged, and streams that expand without end."""

import base64
import binascii
import bz2
import lzma
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.compression import CONTENT_TYPES, compress, content_type, decompress
from aqueue.errors import BadMessage, ConfigurationError
from tests.unit.elements import error_of, quickly
from tests.unit.vectors import load, task

NAMES = ["gzip", "bzip2", "lzma", "brotli", "zstd"]
MIB = 1024 * 1024


def refused(data: bytes, name: str, limit: int = 1000) -> str:
    with pytest.raises(BadMessage) as caught:
        decompress(data, name, limit)
    return caught.value.reason


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fails when more than so many bytes are taken at once by what is inside."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes were taken"


# --- the captured vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_stream_is_expanded(name: str) -> None:
    found = load(f"redis_task_{name}")["messages_in_publish_order"][0]
    data = base64.b64decode(found["envelope"]["body"])
    assert data.hex().startswith(found["compressed_body_hex_prefix"])
    assert decompress(data, found["envelope"]["headers"]["compression"], MIB).decode() == found["body_text"]


@pytest.mark.parametrize("name", NAMES)
def test_a_compressor_travels_under_the_content_type_that_celery_writes(name: str) -> None:
    captured = task(name)
    data, kind = compress(b"x" * 100, name)
    assert kind == content_type(name) == captured.envelope["headers"]["compression"]
    assert data[:2] == base64.b64decode(captured.envelope["body"])[:2] or name == "brotli"


@pytest.mark.parametrize(
    ("name", "stream"),
    [("gzip", "zlib"), ("zlib", "zlib"), ("bzip2", "bz2"), ("bzip", "bz2"), ("lzma", "xz"), ("xz", "xz")],
)
def test_streams_are_what_other_readers_expect(name: str, stream: str) -> None:
    data = compress(b"hello", name)[0]
    readers: dict[str, Any] = {"zlib": zlib.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}
    assert readers[stream](data) == b"hello"
    if stream == "xz":
        assert data.startswith(b"\xfd7zXZ\x00")


# --- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONTENT_TYPES))
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 20, b"\0" * 10_000])
def test_what_is_compressed_is_expanded_again(name: str, data: bytes) -> None:
    compressed, kind = compress(data, name)
    assert decompress(compressed, name, len(data)) == data
    assert decompress(compressed, kind, len(data)) == data


@given(data=st.binary(max_size=500), name=st.sampled_from(NAMES))
@settings(max_examples=40, deadline=None)
def test_any_bytes_come_back(data: bytes, name: str) -> None:
    assert decompress(compress(data, name)[0], name, 500) == data


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_is_a_size_that_still_fits(name: str) -> None:
    data = compress(b"abc" * 100, name)[0]
    assert decompress(data, name, 300) == b"abc" * 100
    assert refused(data, name, 299) == "too_large"
    assert refused(data, name, 0) == "too_large"


# --- damaged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_ends_early_is_refused(name: str) -> None:
    data = compress(bytes(range(200)), name)[0]
    for length in range(len(data)):
        assert refused(data[:length], name) == "bad_compression"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", [b"x", b"\0", b"\0\0\0\0"])
def test_bytes_behind_the_end_are_refused(name: str, tail: bytes) -> None:
    assert refused(compress(b"hello", name)[0] + tail, name) == "bad_compression"


@pytest.mark.parametrize("name", NAMES)
def test_a_second_stream_behind_the_first_is_refused(name: str) -> None:
    data = compress(b"hello", name)[0]
    assert refused(data + data, name) == "bad_compression"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("junk", [b"", b"junk" * 10, b"\xff" * 30, b"\0" * 30])
def test_bytes_that_are_no_stream_are_refused(name: str, junk: bytes) -> None:
    assert refused(junk, name) in ("bad_compression", "too_large")


@given(
    data=st.sampled_from([(name, compress(bytes(range(100)) * 3, name)[0]) for name in NAMES]),
    place=st.integers(0, 1000),
    value=st.integers(1, 255),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_stream_is_refused_or_expanded_and_nothing_else(
    data: tuple[str, bytes], place: int, value: int
) -> None:
    name, stream = data
    damaged = bytearray(stream)
    damaged[place % len(stream)] ^= value
    error = error_of(BadMessage, lambda: decompress(bytes(damaged), name, 1000))
    assert error is None or error.reason in ("bad_compression", "too_large")


def test_a_gzip_file_is_not_what_the_wire_calls_gzip() -> None:
    assert refused(zlib.compress(b"hello", wbits=31), "gzip") == "bad_compression"


# --- without end ---------------------------------------------------------------------------------------------------

BOMBS = {name: compress(b"\0" * 3_000_000, name)[0] for name in NAMES}
BOMBS["lzma"] = lzma.compress(b"\0" * 3_000_000, preset=0)  # the usual one may take 8 MiB for its dictionary


@pytest.mark.parametrize("name", NAMES)
def test_a_few_bytes_do_not_fill_the_memory(name: str) -> None:
    assert len(BOMBS[name]) < 5_000
    with quickly(), memory_below(1_500_000):
        assert refused(BOMBS[name], name, 100_000) == "too_large"


def with_a_window_of(size_code: int) -> bytes:
    """An xz stream of a few bytes that says it needs a dictionary of up to 4 GiB (code 40)."""
    stream = lzma.compress(b"hello")
    header = bytearray(stream[12:24])
    assert header[2:4] == b"\x21\x01", "the filter is LZMA2, with one byte of properties"
    header[4] = size_code
    header[-4:] = struct.pack("<I", binascii.crc32(header[:-4]))
    return stream[:12] + bytes(header) + stream[24:]


@pytest.mark.parametrize("size_code", [34, 37, 40])
def test_a_stream_may_not_ask_for_a_huge_dictionary(size_code: int) -> None:
    with memory_below(256 * MIB):
        error = error_of(BadMessage, lambda: decompress(with_a_window_of(size_code), "xz", 1000))
    assert error is None or error.reason in ("bad_compression", "too_large")


def test_the_older_form_of_lzma_may_not_ask_for_a_huge_dictionary_either() -> None:
    stream = bytearray(lzma.compress(b"hello", format=lzma.FORMAT_ALONE))
    stream[1:5] = b"\xff\xff\xff\xff"
    with memory_below(256 * MIB):
        error = error_of(BadMessage, lambda: decompress(bytes(stream), "xz", 1000))
    assert error is None or error.reason in ("bad_compression", "too_large")


def test_the_best_preset_of_every_sender_is_still_read() -> None:
    assert decompress(lzma.compress(b"hello", preset=9 | lzma.PRESET_EXTREME), "xz", 10) == b"hello"


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "squeeze", "GZIP", "application/x-squeeze", "deflate", "x" * 100_000])
def test_an_unknown_compressor_is_refused_on_reading_and_a_mistake_on_writing(name: str) -> None:
    assert refused(b"", name) == "bad_compression"
    with pytest.raises(BadMessage) as caught:
        decompress(b"", name, 1)
    assert len(str(caught.value)) < 200
    with pytest.raises(ConfigurationError, match="unknown compression"):
        compress(b"", name)
    with pytest.raises(ConfigurationError, match="zstd"):
        content_type(name)


@pytest.mark.parametrize(
    ("name", "modules"), [("brotli", ["brotli", "brotlicffi"]), ("zstd", ["backports.zstd", "compression.zstd"])]
)
def test_a_missing_package_is_named_with_what_to_do(
    name: str, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = compress(b"hello", name)[0]
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=f"aqueue\\[{name}\\]"):
        compress(b"hello", name)
    assert refused(data, name) == "bad_compression"
