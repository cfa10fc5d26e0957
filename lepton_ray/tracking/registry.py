"""Registered models: versions, aliases, and the reference ``name@alias`` or ``name/version``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lepton_ray.errors import ModelError
from lepton_ray.tracking.store import client

ARTIFACT = "version"  # the name under which a version's folder is logged
CHAMPIONS = "lepton_ray.champions"  # tag of a registered model: its champions so far
CHAMPIONS_KEPT = 50
LOCK = ".promotion"  # ending of the name that stands for a promotion going on; no model has a dot
LOCK_S = 30.0  # a promotion takes milliseconds; an older lock is of a dead process
REQUIREMENTS = ("lepton-ray", "onnxruntime", "numpy", "pandas", "pydantic", "safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    source: str
    """URI of the logged model."""

    def folder(self) -> Path:
        """The version's files, on this machine.

        Raises:
            ModelError: when they cannot be fetched.
        """
        try:
            with _no_progress_bar():
                root = Path(mlflow.artifacts.download_artifacts(self.source))
        except (MlflowException, OSError) as error:
            raise ModelError(
                f"the files of {self.name}/{self.version} cannot be read: {error}"
            ) from error
        folder = root / "artifacts" / ARTIFACT
        if not folder.is_dir():
            raise ModelError(f"{self.name}/{self.version} was not made by lepton_ray")
        return folder


@dataclass(frozen=True)
class Model:
    """A registered model."""

    aliases: dict[str, int]
    """Alias -> version."""
    tags: dict[str, str]


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    before = os.environ.get("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"]
        else:
            os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = before


def register(
    name: str,
    *,
    run_id: str,
    folder: Path,
    python_model: Path,
    signature: Any,
    tags: dict[str, str],
) -> ModelVersion:
    """Log a version's folder to a run as a pyfunc model and register it.

    Args:
        folder: what `serving.package.build` made.
        python_model: the models-from-code file, so that nothing is pickled.
    """
    store = client()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    requirements = [f"{p}=={importlib.metadata.version(p)}" for p in REQUIREMENTS]
    with mlflow.start_run(run_id=run_id), _no_progress_bar(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an example of its input: a version carries its own
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(python_model),
            artifacts={ARTIFACT: str(folder)},
            signature=signature,
            pip_requirements=requirements,
        )
    with contextlib.suppress(MlflowException):  # it exists already
        store.create_registered_model(name)
    made = store.create_model_version(
        name, source=info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id
    )
    return _value(store, made)


def resolve(reference: str) -> ModelVersion:
    """The version that ``name@alias`` or ``name/version`` names now.

    Raises:
        ModelError: for a malformed reference, or when there is no such version.
    """
    store = client()
    name, at, alias = reference.partition("@")
    try:
        if at:
            return _value(store, store.get_model_version_by_alias(name, alias))
        name, slash, version = reference.partition("/")
        if slash and version.isdigit():
            return _value(store, store.get_model_version(name, version))
    except MlflowException as error:
        raise ModelError(f"no model {reference!r}: {_hint(store, name)}") from error
    raise ModelError(
        f"a model is named NAME@ALIAS or NAME/VERSION, as in digits@champion, got {reference!r}"
    )


def name_of(reference: str) -> str:
    """The model's name in ``name@alias``, ``name/version`` or a bare name."""
    return re.split("[@/]", reference)[0]


def find_champion(name: str) -> ModelVersion | None:
    """The version with the alias ``champion``, if there is one."""
    store = client()
    try:
        return _value(store, store.get_model_version_by_alias(name, "champion"))
    except MlflowException:
        return None


def promote(version: ModelVersion, *, instead_of: int | None) -> None:
    """Make a version the champion, if the champion is still the one it was compared with.

    Args:
        instead_of: the version that was champion then; None for none.

    Raises:
        ModelError: when another promotion was quicker.
    """
    with promoting(version.name) as store:
        promote_locked(store, version, instead_of=instead_of)


def promote_locked(store: MlflowClient, version: ModelVersion, *, instead_of: int | None) -> None:
    """The same, for one who holds `promoting`."""
    champion = find_champion(version.name)
    now = champion.version if champion else None
    if now != instead_of:
        raise ModelError(
            f"{version.name}@champion moved from {instead_of or 'none'} to {now or 'none'} "
            f"while version {version.version} was compared: promote it again"
        )
    _move_champion(store, version, [*_champions(version.name), version.version])


def rollback(name: str) -> ModelVersion:
    """Make the champion before the present one champion again.

    Raises:
        ModelError: when there is none.
    """
    with promoting(name) as store:
        past = _champions(name)
        if len(past) < 2:
            raise ModelError(f"{name}@champion has no version before it to go back to")
        version = resolve(f"{name}/{past[-2]}")
        _move_champion(store, version, past[:-1])
        return version


def _move_champion(store: MlflowClient, version: ModelVersion, past: list[int]) -> None:
    store.set_registered_model_alias(version.name, "champion", str(version.version))
    kept = ",".join(str(v) for v in past[-CHAMPIONS_KEPT:])
    store.set_registered_model_tag(version.name, CHAMPIONS, kept)


def _champions(name: str) -> list[int]:
    """The versions that were champion, in their order; the present one is the last.

    Raises:
        ModelError: when there is no such model.
    """
    return [int(v) for v in model(name).tags.get(CHAMPIONS, "").split(",") if v]


def model(name: str) -> Model:
    """What the registry says of a model now, by one question.

    Raises:
        ModelError: when there is no such model.
    """
    store = client()
    try:
        found = store.get_registered_model(name)
    except MlflowException as error:
        raise ModelError(f"no model {name!r}: {_hint(store, name)}") from error
    return Model({a: int(v) for a, v in found.aliases.items()}, dict(found.tags))


@contextlib.contextmanager
def promoting(name: str) -> Iterator[MlflowClient]:
    """One promotion of a model at a time, on any MLflow store: names are unique in all of them.

    Raises:
        ModelError: while another one is going on.
    """
    store = client()
    lock = f"{name}{LOCK}"
    for attempt in range(2):
        try:
            store.create_registered_model(lock)
            break
        except MlflowException:
            with contextlib.suppress(MlflowException):  # it may be gone by now
                made_ms = store.get_registered_model(lock).creation_timestamp
                if attempt == 0 and time.time() * 1000 - made_ms > LOCK_S * 1000:
                    store.delete_registered_model(lock)  # its process died
                    continue
            raise ModelError(
                f"another promotion of {name!r} is going on: try again in some seconds"
            ) from None
    try:
        yield store
    finally:
        store.delete_registered_model(lock)


def versions(name: str | None = None) -> list[ModelVersion]:
    """All versions of one model or of all, newest first."""
    store = client()
    # Not by a filter of MLflow: it cannot quote a name that holds a quote.
    listed = [v for v in store.search_model_versions() if name in (None, v.name)]
    found = [_value(store, v) for v in listed]
    if name and not found:
        raise ModelError(f"no model {name!r}: {_hint(store, name)}")
    return sorted(found, key=lambda v: (v.name, -v.version))


def manifest(version: ModelVersion) -> dict[str, Any]:
    """The version's manifest: file digests, software, weights, provenance."""
    value: dict[str, Any] = json.loads((version.folder() / "manifest.json").read_text())
    return value


def _hint(store: MlflowClient, name: str) -> str:
    listed = [m.name for m in store.search_registered_models()]
    known = sorted(n for n in listed if not n.endswith(LOCK))
    if name not in known:
        return f"registered are: {', '.join(known) or 'none yet'}"
    found = store.get_registered_model(name)
    aliases = ", ".join(f"{a} -> {v}" for a, v in found.aliases.items()) or "none"
    way = f"lepton-ray models list {name} shows its versions"
    if "champion" not in found.aliases:
        way += f", and lepton-ray models promote {name}/VERSION makes one the champion"
    return f"{name} has the aliases: {aliases}; {way}"


def _value(store: MlflowClient, version: Any) -> ModelVersion:
    found = store.get_registered_model(version.name)
    aliases = tuple(a for a, v in found.aliases.items() if str(v) == str(version.version))
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        run_id=version.run_id,
        aliases=aliases,
        tags=dict(version.tags),
        source=version.source,
    )
