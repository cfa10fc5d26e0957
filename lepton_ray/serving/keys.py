"""API keys: made once, kept as SHA-256 in a file that only its owner can read.

A key is ``lr-ID-SECRET``. The secret has 256 random bits, so a plain SHA-256 of it cannot be turned
back, and needs no slow hash. The ID is public: it names the key in lists and logs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lepton_ray.errors import ServingError, nearest
from lepton_ray.serving.refusals import RefusedError

DEFAULT_FILE = "lepton_keys.json"
SCOPES = ("predict", "explain", "admin")  # admin: all of them, and /metrics
FORMAT = 1
_KEY = re.compile(r"lr-([0-9a-f]{8})-[0-9a-f]{64}")
_NOBODY = hashlib.sha256(b"").hexdigest()  # compared with where no key has the ID


@dataclass(frozen=True)
class Key:
    """One entry of the file; the key itself is not in it."""

    id: str
    name: str
    sha256: str
    scopes: tuple[str, ...]
    rate_per_s: float | None = None
    """Requests a second over all replicas; None for as many as the endpoint can."""
    created: str = ""


def make(name: str, scopes: tuple[str, ...], rate_per_s: float | None) -> tuple[str, Key]:
    """A new key, and its entry."""
    id_ = secrets.token_hex(4)
    text = f"lr-{id_}-{secrets.token_hex(32)}"
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return text, Key(id_, name, _digest(text), scopes, rate_per_s, created)


def read(path: Path) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        ServingError: when it is missing, damaged, or open to others than its owner.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise ServingError(
                    f"the key file {path} must be open to its owner only, but has mode {mode:o}: "
                    f"chmod 600 {path}"
                )
            content = json.load(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return tuple(_entry(value) for value in content["keys"])
    except FileNotFoundError:
        raise ServingError(
            f"the key file {path} does not exist: lepton-ray keys create NAME --file {path}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError(f"the key file {path} cannot be read: {error}") from error


def create(path: Path, name: str, scopes: tuple[str, ...], rate_per_s: float | None) -> str:
    """Add a key to the file, which is made when missing; returns the key, for the only time.

    Raises:
        ServingError: for a name that is taken, or a file that cannot be used.
    """
    text, key = make(name, scopes, rate_per_s)
    with _changing(path):
        known = read(path) if path.exists() else ()
        if name in (k.name for k in known):
            raise ServingError(
                f"a key is named {name!r} already: revoke it, or choose another name"
            )
        _write(path, (*known, key))
    return text


def revoke(path: Path, name: str) -> Key:
    """Take a key out of the file; running endpoints refuse it within seconds.

    Raises:
        ServingError: when no key has this name or ID.
    """
    with _changing(path):
        known = read(path)
        found = [key for key in known if name in (key.name, key.id)]
        if not found:
            hint = nearest(name, [key.name for key in known])
            raise ServingError(f"no key is named {name!r}; {hint}")
        _write(path, tuple(key for key in known if key is not found[0]))
    return found[0]


class Keyring:
    """The keys an endpoint accepts, and how much of its rate each has used.

    Args:
        keys: present ones; `replace` changes them and leaves the rates as they are.
    """

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self._left: dict[str, tuple[float, float]] = {}  # id -> requests left, at time (s)
        self.replace(keys, replicas=1)

    def replace(self, keys: tuple[Key, ...], *, replicas: int) -> None:
        """Each of ``replicas`` grants its part of a key's rate."""
        self._keys = {key.id: key for key in keys}
        self._replicas = max(1, replicas)
        self._left = {id_: left for id_, left in self._left.items() if id_ in self._keys}

    def admit(self, authorization: str, scope: str, now_s: float) -> Key:
        """The key of a request, after taking one request off its rate.

        Args:
            authorization: the header, or "".
            now_s: of a clock that only goes forward.

        Raises:
            RefusedError: 401 without a valid key, 403 without the scope, 429 beyond the rate.
        """
        kind, _, text = authorization.strip().partition(" ")
        match = _KEY.fullmatch(text.strip())
        key = self._keys.get(match[1]) if match and kind.lower() == "bearer" else None
        # Without a key of this ID the same work is done, so that time tells nothing about IDs.
        expected = key.sha256 if key else _NOBODY
        if not hmac.compare_digest(_digest(text.strip()), expected) or key is None:
            raise RefusedError(401, "a valid key is needed: Authorization: Bearer KEY")
        if scope not in key.scopes and "admin" not in key.scopes:
            raise RefusedError(
                403, f"this needs a key of scope {scope}, but {key.id} has {', '.join(key.scopes)}"
            )
        wait_s = self._take(key, now_s)
        if wait_s > 0:
            raise RefusedError(
                429,
                f"key {key.id} has {key.rate_per_s:g} requests a second: send fewer",
                retry_after_s=wait_s,
            )
        return key

    def _take(self, key: Key, now_s: float) -> float:
        """Seconds to wait, or 0 and one request is taken. A bucket holds one second's requests."""
        if key.rate_per_s is None:
            return 0.0
        rate = key.rate_per_s / self._replicas
        most = max(1.0, rate)
        left, at = self._left.get(key.id, (most, now_s))
        left = min(most, left + (now_s - at) * rate)
        allowed = left >= 1
        self._left[key.id] = (left - 1 if allowed else left, now_s)
        return 0.0 if allowed else (1 - left) / rate


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(value: dict[str, object]) -> Key:
    key = Key(**{**value, "scopes": tuple(value["scopes"])})  # type: ignore[arg-type]
    unknown = set(key.scopes) - set(SCOPES)
    rate = key.rate_per_s
    if unknown or not re.fullmatch("[0-9a-f]{64}", key.sha256) or (rate is not None and rate <= 0):
        raise ValueError(f"the entry of key {key.name!r} is damaged")
    return key


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One writer at a time: of two at once, one could bring back what the other revoked."""
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise ServingError(f"the key file {path} cannot be written: {error}") from error


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Aside and renamed: a reader sees the old file or the new one; never open to others."""
    aside = Path(f"{path}.tmp")
    aside.unlink(missing_ok=True)
    number = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(number, "w") as file:
        json.dump({"format": FORMAT, "keys": [asdict(key) for key in keys]}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
