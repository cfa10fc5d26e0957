"""Versions that several files ask, built once."""

from __future__ import annotations

import pytest

from lepton_ray.serving.runtime import Runtime
from tests import apps


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return apps.people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return apps.digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return apps.diabetes(tmp_path_factory.mktemp("diabetes"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return apps.reviews(tmp_path_factory.mktemp("reviews"))
