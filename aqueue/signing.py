"""Celery's ``auth`` serializer: bodies signed with RSA keys (celery-protocol 1.12).

The signature covers the body alone. Task name, id, ETA and every other header can be changed by whoever can
write to the broker, and a signed body can be sent again: `auth` says who made the arguments, no more.
"""

import base64
import binascii
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from aqueue.errors import BadMessage, ConfigurationError
from aqueue.serialization import Encoded

_SEPARATOR: Final = b"\x00\x01"


class Auth:
    """Signs with one key, verifies against a store of certificates; give it to ``Settings(signer=...)``.

    ``key`` and ``certificate`` are PEM files, ``store`` is a folder or a glob of PEM files with one
    certificate each. Raises ConfigurationError for what can't be read, has expired, or stands there twice.
    """

    def __init__(
        self,
        key: str | Path,
        certificate: str | Path,
        store: str | Path,
        *,
        digest: str = "sha256",
        key_password: bytes | None = None,
    ) -> None:
        self._digest = _hash(digest)
        self._key = _private_key(Path(key), key_password)
        self._signer = _signer_id(_certificate(Path(certificate)))
        self._store: dict[str, x509.Certificate] = {}
        for path in _files(store):
            found = _certificate(path)
            if _signer_id(found) in self._store:
                raise ConfigurationError(f"{path}: a second certificate of {_signer_id(found)!r}")
            self._store[_signer_id(found)] = found

    def sign(self, body: Encoded) -> bytes:
        """The body in its signed envelope."""
        signature = self._key.sign(body.data, self._padding(), self._digest)
        fields = (
            base64.b64encode(self._signer.encode()),
            base64.b64encode(signature),
            body.content_type.encode(),
            body.content_encoding.encode(),
            body.data,
        )
        return base64.b64encode(_SEPARATOR.join(fields))

    def verify(self, data: bytes) -> Encoded:
        """The body, if its signature is right. Raises BadMessage ``bad_signature``."""
        try:
            parts = base64.b64decode(data, validate=True).split(_SEPARATOR, 4)
            signer, signature, content_type, content_encoding, body = parts
            name = base64.b64decode(signer, validate=True).decode()
            self._check(name, base64.b64decode(signature, validate=True), body)
            return Encoded(content_type.decode(), content_encoding.decode(), body)
        except (binascii.Error, ValueError) as error:
            raise BadMessage("bad_signature", f"not a signed body: {error}") from error

    def _check(self, name: str, signature: bytes, body: bytes) -> None:
        certificate = self._store.get(name)
        if certificate is None:
            raise BadMessage("bad_signature", f"no certificate of {name[:200]!r} in the store")
        if (expired := _expired(certificate)) is not None:
            raise BadMessage("bad_signature", f"the certificate of {name[:200]!r} {expired}")
        try:
            _public_key(certificate).verify(signature, body, self._padding(), self._digest)
        except InvalidSignature:
            raise BadMessage("bad_signature", f"the signature of {name[:200]!r} does not fit the body") from None

    def _padding(self) -> padding.PSS:
        return padding.PSS(mgf=padding.MGF1(self._digest), salt_length=padding.PSS.MAX_LENGTH)


def _hash(name: str) -> hashes.HashAlgorithm:
    known: dict[str, type[hashes.HashAlgorithm]] = {
        kind.__name__.lower(): kind
        for kind in (hashes.SHA224, hashes.SHA256, hashes.SHA384, hashes.SHA512, hashes.SHA3_256, hashes.SHA3_512)
    }
    if name not in known:
        raise ConfigurationError(f"unknown digest {name!r}; use one of {', '.join(sorted(known))}")
    return known[name]()


def _private_key(path: Path, password: bytes | None) -> RSAPrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"can't read the private key {path}: {error}") from None
    if not isinstance(key, RSAPrivateKey):
        raise ConfigurationError(f"{path} is no RSA key")
    return key


def _certificate(path: Path) -> x509.Certificate:
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"can't read the certificate {path}: {error}") from None
    _public_key(found)
    if (expired := _expired(found)) is not None:
        raise ConfigurationError(f"the certificate {path} {expired}")
    return found


def _expired(certificate: x509.Certificate) -> str | None:
    ends = certificate.not_valid_after_utc
    return f"expired on {ends:%Y-%m-%d}" if ends < datetime.now(timezone.utc) else None


def _public_key(certificate: x509.Certificate) -> RSAPublicKey:
    key = certificate.public_key()
    if not isinstance(key, RSAPublicKey):
        raise ConfigurationError("only RSA certificates can sign and verify messages")
    return key


def _signer_id(certificate: x509.Certificate) -> str:
    """Who a certificate is of: its issuer's attributes, then its serial number."""
    issuer = " ".join(str(attribute.value) for attribute in certificate.issuer)
    return f"{issuer} {certificate.serial_number}"


def _files(store: str | Path) -> Iterable[Path]:
    folder = Path(store)
    listed = folder.iterdir() if folder.is_dir() else folder.parent.glob(folder.name)
    found = sorted(path for path in listed if not path.name.startswith("."))  # Kubernetes has some beside its files
    if not found:
        raise ConfigurationError(f"no certificates at {store}; name a folder or a glob of PEM files")
    return found
