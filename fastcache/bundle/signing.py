"""A bundle's manifest, which holds every file's hash -> its signature, and whether a key that is trusted made it.

Ed25519, in the forms of `openssl`: keys in PEM, the signature its 64 bytes in a file of its own. Knows nothing of what
a manifest says.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.errors import BackendUnavailable, BundleError
from fastcache_engines.extras import install

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.sig"
_BYTES = 64
# Of each half of a key: what it is called, and how it is made.
_PRIVATE = "private", "make one with `openssl genpkey -algorithm ed25519 -out KEY`"
_PUBLIC = "public", "make it with `openssl pkey -in KEY -pubout -out FILE`"

Sign = Callable[[bytes], bytes]


def signer(key_file: Path) -> Sign:
    """What signs with the key in a file.

    Raises: `ValueError` for a file without a private key, or with one under a passphrase; `BackendUnavailable`.
    """
    kind, keys = _library("Ed25519PrivateKey")
    key: Ed25519PrivateKey = _read(key_file, kind, lambda pem: keys.load_pem_private_key(pem, None), "sign", _PRIVATE)
    return key.sign


def _public_key(file: Path) -> Ed25519PublicKey:
    kind, keys = _library("Ed25519PublicKey")
    return _read(file, kind, keys.load_pem_public_key, "trusted key", _PUBLIC)


def _library(kind: str) -> tuple[Any, Any]:
    """A class of keys, and what reads them. Raises: `BackendUnavailable`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise BackendUnavailable(
            f"expected the package cryptography for signatures, got none; run: {install('sign')}"
        ) from None
    return getattr(ed25519, kind), serialization


def _read(file: Path, kind: Any, load: Callable[[bytes], Any], argument: str, half: tuple[str, str]) -> Any:
    try:
        key, got = load(file.read_bytes()), "another kind of key"
    except OSError as error:
        key, got = None, error.strerror
    except Exception:  # of several kinds, which cryptography words for programmers
        key, got = None, "no such PEM, or one under a passphrase"
    if not isinstance(key, kind):
        raise ValueError(
            f"expected {argument} to be a PEM file of an Ed25519 {half[0]} key, got {str(file)!r}: {got}; {half[1]}"
        )
    return key


def require_signature(folder: Path, manifest: bytes, trusted: Path) -> None:
    """See that a bundle's manifest, these bytes, was signed with the private half of the key in a file.

    Raises: `BundleError`; `ValueError` for a file that holds no public key; `BackendUnavailable`.
    """
    key = _public_key(trusted)
    from cryptography.exceptions import InvalidSignature

    signed = f"expected {folder} to be signed by the key of {trusted}"
    if not is_signature(folder / SIGNATURE):
        raise BundleError(
            f"{signed}, got no {SIGNATURE} of {_BYTES} bytes; ask its builder for one (build-engines --sign)"
        )
    try:
        key.verify((folder / SIGNATURE).read_bytes(), manifest)
    except InvalidSignature:
        raise BundleError(
            f"{signed}, got another key's signature, or a manifest changed since; do not load it"
        ) from None


def is_signature(file: Path) -> bool:
    """Whether a plain file of a signature's size lies there."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == _BYTES
