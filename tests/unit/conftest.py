"""Versions that several files ask, built once; and what tests must not do to each other."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from lepton_ray import priority
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


@pytest.fixture(autouse=True)
def the_main_thread_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker makes itself nice when it starts; a test that makes one here would do it to all
    tests after it, and what they start."""
    real = priority._make_nice

    def spare(threads: Iterable[int], niceness: int) -> None:
        real([thread for thread in threads if thread != os.getpid()], niceness)

    monkeypatch.setattr(priority, "_make_nice", spare)
