"""Signed bodies: the captured vector, both directions, and everything that may be wrong with a signature."""

import base64
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue import AQueue, Settings
from aqueue.errors import BadMessage, ConfigurationError
from aqueue.serialization import DATA, Encoded, Serializer
from aqueue.signing import Auth
from tests.unit.elements import element, read, reason
from tests.unit.vectors import WIRE, load, task

KEY, CERTIFICATE, STORE = WIRE / "auth" / "worker.key", WIRE / "auth" / "worker.pem", WIRE / "auth" / "*.pem"
SIGNER = "XX Throwaway Test test signer 123456789"
BODY = Encoded("application/json", "utf-8", b"[[2, 3], {}, {}]")
AnyKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def captured() -> Auth:
    """With the key and the certificate of the vector."""
    return Auth(KEY, CERTIFICATE, STORE)


@cache
def some_key(number: int = 0) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=1024 + 256 * number)


@dataclass
class Signer:
    """Somebody with a key and a certificate of their own, as files."""

    key: Path
    certificate: Path

    def auth(self, store: Path, **options: Any) -> Auth:
        return Auth(self.key, self.certificate, store, **options)


@pytest.fixture
def make_signer(tmp_path: Path) -> Callable[..., Signer]:
    """Makes signers; their certificates are in the folder ``store``."""
    store = tmp_path / "store"
    store.mkdir()

    def make(
        name: str,
        *,
        serial: int = 1,
        ends: timedelta = timedelta(days=1),
        key: AnyKey | None = None,
        secret: KeySerializationEncryption | None = None,
        file: str | None = None,
    ) -> Signer:
        key = key or some_key()
        who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(timezone.utc)
        built = (
            x509.CertificateBuilder()
            .subject_name(who)
            .issuer_name(who)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + ends)
            .sign(key, hashes.SHA256())
        )
        file = file or name
        made = Signer(tmp_path / f"{file}.key", store / f"{file}.pem")
        made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret or NoEncryption()))
        made.certificate.write_bytes(built.public_bytes(Encoding.PEM))
        return made

    return make


def fields(signed: bytes) -> list[bytes]:
    return base64.b64decode(signed, validate=True).split(b"\x00\x01", 4)


def sealed(parts: list[bytes]) -> bytes:
    return base64.b64encode(b"\x00\x01".join(parts))


def refused(auth: Auth, data: bytes) -> str:
    with pytest.raises(BadMessage) as caught:
        auth.verify(data)
    assert caught.value.reason == "bad_signature"
    return caught.value.detail


# --- the captured vector -----------------------------------------------------------------------------------


def test_the_captured_body_is_verified() -> None:
    unpacked = load("redis_task_auth")["unpacked"]
    signed = base64.b64decode(task("auth").envelope["body"])
    assert captured().verify(signed) == Encoded(
        unpacked["field2_content_type"], unpacked["field3_content_encoding"], unpacked["field4_signed_body"].encode()
    )


def test_the_captured_message_is_read_by_an_app_that_accepts_signed_content() -> None:
    serializer = Serializer(["auth"], signer=captured())
    request = read(task("auth").raw, serializer)
    assert (request.args, request.id) == ([2, 3], "22222222-2222-4222-8222-222222222222")


def test_an_app_that_does_not_accept_signed_content_refuses_it() -> None:
    assert reason(task("auth").raw) == "content_refused"


def test_an_app_that_accepts_signed_content_alone_refuses_unsigned_content() -> None:
    assert reason(task("simple").raw, Serializer(["auth"], signer=captured())) == "content_refused"


def test_a_body_is_signed_in_the_form_that_celery_reads() -> None:
    unpacked = load("redis_task_auth")["unpacked"]
    signer, signature, content_type, content_encoding, body = fields(captured().sign(BODY))
    assert signer.decode() == unpacked["field0_signer_b64"]
    assert base64.b64decode(signer).decode() == SIGNER == unpacked["field0_signer"]
    assert len(base64.b64decode(signature)) == unpacked["field1_signature_len"]
    assert (content_type, content_encoding, body) == (b"application/json", b"utf-8", BODY.data)
    assert b"\n" not in captured().sign(BODY)


def test_our_signature_is_right_by_the_library_alone() -> None:
    signature = base64.b64decode(fields(captured().sign(BODY))[1])
    key = x509.load_pem_x509_certificate(CERTIFICATE.read_bytes()).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    salt = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=key.key_size // 8 - 32 - 2)
    key.verify(signature, BODY.data, salt, hashes.SHA256())


def test_a_value_is_signed_and_read_by_the_serializer() -> None:
    serializer = Serializer(["auth"], signer=captured())
    encoded = serializer.dumps([1, b"\xff"], "auth")
    assert (encoded.content_type, encoded.content_encoding) == (DATA, "utf-8")
    assert serializer.loads(encoded.data, encoded.content_type, encoded.content_encoding) == [1, b"\xff"]


async def test_an_app_that_signs_sends_and_reads_its_own_messages() -> None:
    settings = Settings(serializer="auth", accept_content=["auth"], signer=captured())
    async with AQueue("proj", broker="memory://", settings=settings) as app:
        await app.send_task("t", [5])
        (delivery,) = await app.producer().broker.fetch(["celery"], 1, 0)
        assert app.serializer.loads(delivery.message.body, DATA, "utf-8")[0] == [5]  # type: ignore[union-attr]


@given(st.binary(max_size=200) | st.just(b"\x00\x01" * 9))
@settings(max_examples=20, deadline=None)
def test_any_body_is_signed_and_verified(body: bytes) -> None:
    auth = captured()
    assert auth.verify(auth.sign(Encoded("a", "b", body))) == Encoded("a", "b", body)


# --- what may be wrong ---------------------------------------------------------------------------------------


def test_a_changed_body_is_refused() -> None:
    parts = fields(captured().sign(BODY))
    for changed in (b"[[2, 4], {}, {}]", b"", parts[4] + b" ", parts[4][:-1]):
        assert "does not fit" in refused(captured(), sealed([*parts[:4], changed]))


def test_a_changed_signature_is_refused() -> None:
    parts = fields(captured().sign(BODY))
    signature = bytearray(base64.b64decode(parts[1]))
    signature[0] ^= 1
    for changed in (base64.b64encode(signature), b"", base64.b64encode(b"short"), b"&&&", parts[1][:-1]):
        refused(captured(), sealed([parts[0], changed, *parts[2:]]))


def test_a_body_signed_by_another_in_our_name_is_refused(make_signer: Callable[..., Signer]) -> None:
    ours, other = make_signer("ours"), make_signer("other", key=some_key(1))
    forged = fields(other.auth(ours.certificate.parent).sign(BODY))
    forged[0] = base64.b64encode(b"ours 1")
    assert "does not fit" in refused(ours.auth(ours.certificate.parent), sealed(forged))


def test_a_signer_that_is_not_in_the_store_is_refused(make_signer: Callable[..., Signer], tmp_path: Path) -> None:
    ours, stranger = make_signer("ours"), make_signer("stranger", key=some_key(1))
    signed = stranger.auth(ours.certificate.parent).sign(BODY)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ours.certificate, alone)
    detail = refused(ours.auth(alone), signed)
    assert "'stranger 1'" in detail
    assert "no certificate" in detail


def test_anybody_in_the_store_may_sign(make_signer: Callable[..., Signer]) -> None:
    ours, friend = make_signer("ours"), make_signer("friend", key=some_key(1))
    store = ours.certificate.parent
    assert ours.auth(store).verify(friend.auth(store).sign(BODY)) == BODY


def test_a_certificate_that_expires_while_we_run_is_refused(
    make_signer: Callable[..., Signer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_signer("ours", ends=timedelta(days=1))
    auth = ours.auth(ours.certificate.parent)
    signed = auth.sign(BODY)
    assert auth.verify(signed) == BODY

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=2)

    monkeypatch.setattr("aqueue.signing.datetime", Later)
    assert "expired" in refused(auth, signed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not base64 &",
        base64.b64encode(b"no fields"),
        base64.b64encode(b"a\x00\x01b"),
        base64.b64encode(b"\x00\x01" * 4),
        base64.b64encode(b"\xff\x00\x01\x00\x01\x00\x01\x00\x01"),
        base64.b64encode(base64.b64encode(b"\xff") + b"\x00\x01" * 4),
        base64.b64encode(b"x" * 100_000),
        b"\xff\xfe",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_bytes_that_are_no_signed_body_are_refused(data: bytes) -> None:
    assert len(refused(captured(), data)) < 1000


def test_a_line_break_in_the_payload_is_refused() -> None:
    signed = captured().sign(BODY)
    refused(captured(), signed[:60] + b"\n" + signed[60:])


def test_a_signed_pickle_is_refused_unless_pickle_is_accepted_too() -> None:
    auth = captured()
    body = Encoded("application/x-python-serialize", "binary", pickle.dumps(([1], {}, {})))
    raw = element(auth.sign(body), content_type=DATA)
    assert reason(raw, Serializer(["auth"], signer=auth)) == "content_refused"
    assert reason(raw, Serializer(["auth", "json"], signer=auth)) == "content_refused"
    assert read(raw, Serializer(["auth", "pickle"], signer=auth)).args == [1]


@pytest.mark.parametrize("content_type", [DATA, "text/plain", "", "application/x-squeeze"])
def test_signed_content_of_another_kind_is_refused(content_type: str) -> None:
    auth = captured()
    raw = element(auth.sign(Encoded(content_type, "utf-8", b"[[1], {}, {}]")), content_type=DATA)
    assert reason(raw, Serializer(["auth"], signer=auth)) == "content_refused"


def test_a_signed_body_is_read_by_its_own_content_type() -> None:
    auth = captured()
    raw = element(auth.sign(Encoded("application/x-msgpack", "binary", b"\x93\x91\x05\x80\x80")), content_type=DATA)
    assert read(raw, Serializer(["auth"], signer=auth)).args == [5]


def test_a_signed_body_that_cannot_be_decoded_is_refused_for_that() -> None:
    auth = captured()
    serializer = Serializer(["auth"], signer=auth)
    assert (
        reason(element(auth.sign(Encoded("application/json", "utf-8", b"[")), content_type=DATA), serializer)
        == "undecodable"
    )
    assert (
        reason(element(auth.sign(Encoded("application/json", "utf-8", b"[]")), content_type=DATA), serializer)
        == "bad_body"
    )


def test_fields_that_are_no_text_are_refused() -> None:
    parts = fields(captured().sign(BODY))
    refused(captured(), sealed([*parts[:2], b"\xff", *parts[3:]]))
    refused(captured(), sealed([*parts[:3], b"\xff", parts[4]]))


def test_headers_are_not_signed() -> None:
    envelope = json.loads(task("auth").raw)
    envelope["headers"]["task"] = "proj.tasks.other"
    request = read(json.dumps(envelope).encode(), Serializer(["auth"], signer=captured()))
    assert request.task == "proj.tasks.other"


# --- keys and certificates -------------------------------------------------------------------------------------


def test_an_expired_certificate_is_a_mistake_at_the_start(make_signer: Callable[..., Signer]) -> None:
    ours = make_signer("ours")
    make_signer("old", ends=timedelta(days=-1))
    with pytest.raises(ConfigurationError, match=r"old\.pem expired on \d{4}-\d\d-\d\d"):
        ours.auth(ours.certificate.parent)


def test_two_certificates_of_one_signer_are_a_mistake_at_the_start(make_signer: Callable[..., Signer]) -> None:
    ours = make_signer("ours")
    make_signer("ours", file="again")
    with pytest.raises(ConfigurationError, match="second certificate of 'ours 1'"):
        ours.auth(ours.certificate.parent)


def test_one_name_may_have_certificates_of_several_numbers(make_signer: Callable[..., Signer]) -> None:
    first = make_signer("ours", serial=1)
    second = make_signer("ours", serial=2, file="second", key=some_key(1))
    store = first.certificate.parent
    assert first.auth(store).verify(second.auth(store).sign(BODY)) == BODY


def test_a_store_may_be_a_folder_or_a_glob(make_signer: Callable[..., Signer]) -> None:
    ours = make_signer("ours")
    store = ours.certificate.parent
    signed = ours.auth(store).sign(BODY)
    for place in (store, str(store), store / "*.pem", str(store / "o*")):
        assert Auth(str(ours.key), str(ours.certificate), place).verify(signed) == BODY


def test_hidden_files_in_the_store_are_passed_over(make_signer: Callable[..., Signer]) -> None:
    ours = make_signer("ours")
    store = ours.certificate.parent
    (store / ".gitkeep").write_text("")
    (store / "..data").mkdir()  # what Kubernetes puts beside mounted secrets
    assert ours.auth(store).verify(ours.auth(store).sign(BODY)) == BODY


@pytest.mark.parametrize("store", ["nowhere", "nowhere/*.pem", "empty"])
def test_a_store_without_certificates_is_a_mistake(store: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no certificates at"):
        Auth(KEY, CERTIFICATE, tmp_path / store)


@pytest.mark.parametrize("content", [b"", b"no pem", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"])
def test_a_file_that_is_no_certificate_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"bad\.pem"):
        Auth(KEY, CERTIFICATE, tmp_path)
    with pytest.raises(ConfigurationError, match=r"bad\.pem"):
        Auth(tmp_path / "bad.pem", CERTIFICATE, STORE)
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        Auth(KEY, tmp_path / "missing.pem", STORE)
    with pytest.raises(ConfigurationError, match=r"missing\.key"):
        Auth(tmp_path / "missing.key", CERTIFICATE, STORE)


def test_a_key_may_have_a_password(make_signer: Callable[..., Signer]) -> None:
    ours = make_signer("ours", secret=BestAvailableEncryption(b"open sesame"))
    store = ours.certificate.parent
    auth = ours.auth(store, key_password=b"open sesame")
    assert auth.verify(auth.sign(BODY)) == BODY
    for wrong in (None, b"wrong"):
        with pytest.raises(ConfigurationError, match="private key"):
            ours.auth(store, key_password=wrong)


def test_keys_and_certificates_are_rsa(make_signer: Callable[..., Signer]) -> None:
    other = make_signer("other", key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigurationError, match="RSA"):
        other.auth(STORE)
    with pytest.raises(ConfigurationError, match="RSA"):
        Auth(KEY, CERTIFICATE, other.certificate.parent)


@pytest.mark.parametrize("digest", ["sha224", "sha384", "sha512", "sha3_256"])
def test_another_digest_may_be_agreed_on(digest: str) -> None:
    auth = Auth(KEY, CERTIFICATE, STORE, digest=digest)
    assert auth.verify(auth.sign(BODY)) == BODY
    refused(captured(), auth.sign(BODY))


@pytest.mark.parametrize("digest", ["md5", "sha1", "SHA256", "", "hashes"])
def test_an_unknown_or_broken_digest_is_a_mistake(digest: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown digest"):
        Auth(KEY, CERTIFICATE, STORE, digest=digest)
