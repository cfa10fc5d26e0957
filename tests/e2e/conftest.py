"""What all tests of whole commands share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.test_demo import Process


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that fails half-way must not leave its endpoint to the next one."""
    yield
    for process in Process.started:
        if process.process.poll() is None:
            process.process.kill()
    Process.started.clear()
