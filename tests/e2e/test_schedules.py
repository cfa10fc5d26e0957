"""Five of the random schedules of joining, leaving and dying live replicas; `make soak` has 200."""

from __future__ import annotations

import pytest

from tests.elastic import train_live
from tests.unit.test_exactness import PAIRS, experiment
from tests.unit.test_live import check, schedule


@pytest.mark.parametrize("seed", range(5))
def test_a_random_schedule_keeps_the_bytes(seed: int) -> None:
    model, optimizer = PAIRS[seed]
    members = schedule(seed)
    outcome = train_live(
        experiment(model, optimizer), members, part_bytes=1 if seed % 2 else 16 << 20
    )
    check(outcome, model, optimizer, members)
