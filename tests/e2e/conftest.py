"""What all tests of whole commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_demo import Process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that fails half-way must not leave its endpoint to the next one."""
    yield
    for process in Process.started:
        if process.process.poll() is None:
            process.process.kill()
    Process.started.clear()
