"""A throw-away certificate authority for TLS tests."""

from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID


def make_certificates(folder: Path, host: str = "127.0.0.1") -> dict[str, Path]:
    """``ca-cert-file``, ``cert-file`` and ``key-file`` of a server at ``host``."""
    authority_key, authority = _issue("Test authority", None, None)
    key, certificate = _issue(host, authority_key, authority)
    paths = {name: folder / f"{name}.pem" for name in ("ca-cert-file", "cert-file", "key-file")}
    paths["ca-cert-file"].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    paths["cert-file"].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths["key-file"].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def _issue(
    name: str, signing_key: rsa.RSAPrivateKey | None, issuer: x509.Certificate | None
) -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))])
        builder = builder.add_extension(names, critical=False)
    return key, builder.sign(signing_key or key, hashes.SHA256())
