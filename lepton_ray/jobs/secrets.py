"""Secrets on their way to a job: readable for those only who hold the cluster's token.

Ray writes a job's environment variables into its logs and shows them to all of its users, so what
goes there is encrypted with a key made of the token, which both ends have.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from lepton_ray.errors import ClusterError, InputError

VARIABLE = "LEPTON_SECRETS"


def token() -> str | None:
    """Ray's token, where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        InputError: when the file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise InputError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read: {error}") from error
        return None


def seal(names: Sequence[str], environment: Mapping[str, str], key: str | None) -> dict[str, str]:
    """Variables of this environment as one variable that may be seen.

    Args:
        key: the cluster's token.

    Raises:
        InputError: when one is not set, or there is no token to seal them with.
    """
    if not names:
        return {}
    missing = [name for name in names if name not in environment]
    if missing:
        raise InputError(f"--secret {missing[0]}: no such variable in this environment; export it")
    if key is None:
        raise InputError(
            "--secret: the cluster has no token to seal secrets with, and everybody who reaches it "
            "could read them: start it as cluster/ does"
        )
    values = json.dumps({name: environment[name] for name in names})
    return {VARIABLE: _cipher(key).encrypt(values.encode()).decode()}


def unseal(sealed: str, key: str | None) -> dict[str, str]:
    """What `seal` was given.

    Raises:
        ClusterError: when the token is another one.
    """
    try:
        if key is None:
            raise InvalidToken
        values: dict[str, str] = json.loads(_cipher(key).decrypt(sealed.encode()))
    except InvalidToken as error:
        raise ClusterError(
            "the job's secrets were sealed with another token than the head's: submit it again "
            "with the token of this cluster"
        ) from error
    return values


def _cipher(key: str) -> Fernet:
    digest = hashlib.scrypt(key.encode(), salt=b"lepton_ray secrets", n=2**14, r=8, p=1, dklen=32)
    return Fernet(base64.urlsafe_b64encode(digest))
