"""Five of the random schedules of joining, leaving and dying live replicas; `make soak` has 200."""

from __future__ import annotations

import pytest

from tests.unit.test_live import keep_the_bytes


@pytest.mark.parametrize("seed", range(5))
def test_a_random_schedule_keeps_the_bytes(seed: int) -> None:
    keep_the_bytes(seed)
