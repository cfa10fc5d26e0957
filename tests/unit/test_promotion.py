"""The champion: through the gate, one promotion at a time, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import nn

from lepton_ray import data
from lepton_ray.cli import main
from lepton_ray.config import validate
from lepton_ray.config.schema import Canary
from lepton_ray.errors import GateError, InputError, ModelError
from lepton_ray.pipeline import promotion, switching
from lepton_ray.terminal import Silent
from lepton_ray.tracking import endpoints, registry
from lepton_ray.tracking.canary import Decision
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.tracking.store import client
from lepton_ray.training.loop import Replica
from tests import stores, versions

EXPERIMENT = validate(
    {
        "name": "iris",
        "data": {"kind": "table", "source": "sklearn:iris", "target": "target"},
        "model": {"name": "linear"},
        "train": {"epochs": 30, "batch": 16, "optimizer": {"name": "adamw", "lr": 0.05}},
        "gate": {"metric": "accuracy", "at_least": 0.5, "beats": ["baseline", "champion"]},
    }
)
DATASET = data.load(EXPERIMENT.data)


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    replica = Replica(EXPERIMENT, DATASET)
    for _ in replica.epochs():
        pass
    return replica.state.model


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    return tmp_path


def register(root: Path, model: nn.Module, digest: str = "") -> ModelVersion:
    return versions.register(EXPERIMENT, DATASET, model, root, digest)


def champion() -> int | None:
    found = registry.find_champion("iris")
    return found.version if found else None


def test_the_better_version_is_promoted_and_the_worse_one_told_by_how_much(
    store: Path, trained: nn.Module
) -> None:
    register(store, trained)
    register(store, nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    register(store, trained)
    lines = Lines()

    assert promotion.promote("iris/1", lines)["promoted"]
    assert champion() == 1
    assert "iris@champion is version 1" in lines.said[-1]

    with pytest.raises(GateError, match=r"iris/2 has accuracy 0\.\d+ .*\n.*missed by 0\."):
        promotion.promote("iris/2", lines)
    assert champion() == 1

    assert promotion.promote("iris/3", lines)["promoted"], "as good as the champion is enough"
    assert champion() == 3
    assert "already" in str(promotion.promote("iris/3", lines) and lines.said[-1])

    assert switching.rollback("iris", lines)["version"] == 1
    assert champion() == 1
    assert lines.said[-1] == "iris@champion is version 1 again"
    with pytest.raises(ModelError, match="no version before it"):
        switching.rollback("iris", lines)

    compared = promotion.compare(["iris/1", "iris/2", "iris/3"], lines)
    first, other, same = compared["agreement"]
    assert (first, same) == (1.0, 1.0)
    assert other < 1.0
    assert compared["metrics"][0] == compared["metrics"][2]
    assert "iris/1" in lines.said[-1]


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(
    store: Path, trained: nn.Module
) -> None:
    made = [register(store, trained) for _ in range(2)]

    def attempt(version: ModelVersion) -> str:
        try:
            registry.promote(version, instead_of=None)
        except ModelError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(attempt, made))
    assert ends.count("won") == 1, ends
    (told,) = [end for end in ends if end != "won"]
    assert "is going on" in told or "moved from none to" in told
    assert champion() == made[ends.index("won")].version


def test_a_promotion_that_died_does_not_block_the_next_one_for_ever(
    store: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(store, trained)
    client().create_registered_model(f"iris{registry.LOCK}")  # as its process left it
    with pytest.raises(ModelError, match="another promotion of 'iris' is going on"):
        registry.promote(version, instead_of=None)
    with pytest.raises(ModelError, match="registered are: iris$"):
        registry.resolve("irsi/1")
    monkeypatch.setattr(registry, "LOCK_S", 0.0)
    registry.promote(version, instead_of=None)
    assert champion() == 1


def test_a_version_of_other_data_is_not_scored(store: Path, trained: nn.Module) -> None:
    register(store, trained, digest="0" * 64)
    with pytest.raises(ModelError, match=r"data of iris/1 have changed .*digest 000000000000, now"):
        promotion.promote("iris/1", Silent())
    assert champion() is None


def test_rolling_back_what_is_not_registered_says_what_is(store: Path) -> None:
    with pytest.raises(ModelError, match="no model 'iris': registered are: none yet"):
        switching.rollback("iris", Silent())


def test_a_canary_goes_through_the_gate_and_is_changed_and_ended(
    store: Path, trained: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    register(store, trained)
    register(store, trained)
    register(store, nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    lines = Lines()
    with pytest.raises(ModelError, match="no champion"):
        promotion.canary("iris/2=10%", lines)
    promotion.promote("iris/1", lines)
    with pytest.raises(GateError, match="iris/3 .* does not pass the gate"):
        promotion.canary("iris/3", lines)
    with pytest.raises(InputError, match="like 10% or 0.1, but got '0%'"):
        promotion.canary("iris/2=0%", lines)
    with pytest.raises(ModelError, match="is the champion already"):
        promotion.canary("iris/1", lines)
    with pytest.raises(ModelError, match="no version of 'iris' is tried"):
        promotion.canary("iris", lines)

    promotion.canary("iris/2=10%", lines)
    first = endpoints.tried("iris").canary
    assert first is not None
    assert (first.version, first.share, first.instead_of) == (2, 0.1, 1)
    promotion.canary("iris/2=0.5", lines)
    again = endpoints.tried("iris").canary
    assert again == dataclasses.replace(first, share=0.5), "its time and its callers are kept"
    with pytest.raises(InputError, match="a share is of a version: iris/8=20%"):
        promotion.canary("iris=20%", lines)
    with pytest.raises(ModelError, match="iris/2 is tried on 50% of callers"):
        switching.shadow("iris/2", lines)
    assert endpoints.tried("iris").canary == again
    switching.shadow("iris/3", lines)
    assert main(["status", "iris"]) == 0
    said = capsys.readouterr().out
    assert "canary    version 2 on 50% of callers, instead of 1" in said
    assert "shadow    version 3" in said

    promotion.canary("iris", lines)
    switching.shadow("iris/2", lines)
    endpoints.start_canary(registry.resolve("iris/2"), 0.1, Canary())
    assert endpoints.tried("iris").shadow is None, "it is compared as a canary now"
    registry.promote(registry.resolve("iris/3"), instead_of=1)
    before = len(lines.said)
    promotion.canary("iris/2=20%", lines)
    assert "gate   passed" in lines.said[before], "it was tried beside another champion"
    registry.promote(registry.resolve("iris/1"), instead_of=3)

    promotion.canary("iris", lines)
    switching.shadow("iris", lines)
    ended = endpoints.tried("iris")
    assert (ended.canary, ended.shadow) == (None, None)
    assert ended.last is not None
    assert ended.last["reason"] == "it was ended by hand"
    assert champion() == 1


def test_a_canary_is_promoted_only_if_the_champion_is_the_one_it_was_compared_with(
    store: Path, trained: nn.Module
) -> None:
    for _ in range(3):
        register(store, trained)
    promotion.promote("iris/1", Lines())
    promotion.canary("iris/2", Lines())
    tried = endpoints.tried("iris").canary
    assert tried is not None
    registry.promote(registry.resolve("iris/3"), instead_of=1)
    with pytest.raises(ModelError, match="moved from 1 to 3"):
        endpoints.end_canary("iris", tried, Decision("promote", "its time is over"))
    assert champion() == 3
    assert endpoints.end_canary("iris", tried, Decision("end", "another champion"))
    assert not endpoints.end_canary("iris", tried, Decision("end", "another champion")), "once"
    assert registry.resolve("iris/2").tags[endpoints.CANARY] == "ended: another champion"
