"""The contract: replicas that come, go and are killed cannot change a byte of the model."""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment, Train
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.loop import Replica
from lepton_ray.training.membership import Fixed, Peers
from lepton_ray.training.state import TrainState
from lepton_ray.training.step import TrainStep
from tests import nets
from tests.elastic import MODELS, OPTIMIZERS, PHASES, Generation, Kill, Outcome, train

PAIRS = [(m, o) for m in MODELS for o in OPTIMIZERS]
STEPS = 14  # two epochs of 7


def experiment(model: str, optimizer: str, /, **train_settings) -> Experiment:
    return validate(
        {
            "name": "exact",
            "data": {
                "kind": "image",
                "source": "sklearn:digits",
                "split": {"test": 0.7, "validation": 0.15},
            },
            "model": MODELS.get(model, {"name": model}),
            "train": {
                "epochs": 2,
                "batch": 64,
                "shards": 8,
                "optimizer": OPTIMIZERS[optimizer],
                "schedule": {"name": "cosine", "warmup": 0.1},
                "clip": 1.0,
                "digest_every": 2,
                "checkpoint": {"every_steps": 3},
                **train_settings,
            },
        }
    )


@functools.cache
def undisturbed(model: str, optimizer: str) -> Outcome:
    return train(experiment(model, optimizer), [Generation(1)])


def schedule(seed: int) -> list[Generation]:
    """Sizes of 1 to 8 with kills at random steps and phases; the last generation finishes."""
    rng = random.Random(seed)
    generations = []
    step = 0
    for _ in range(rng.randint(1, 3)):
        size = rng.randint(1, 8)
        step = rng.randint(step, STEPS - 1)
        phases = PHASES if size > 1 else ("fetch", "forward", "apply", "optimizer", "checkpoint")
        phase = rng.choice(phases)
        # Only replica 0 writes checkpoints, and after the last step only a forced one is written.
        rank = 0 if phase == "checkpoint" else rng.randrange(size)
        generations.append(Generation(size, Kill(rank, step, phase)))
    return [*generations, Generation(rng.randint(1, 8))]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_size_gives_the_bytes_of_one_replica(size: int) -> None:
    assert train(experiment("cnn", "adamw"), [Generation(size)]) == undisturbed("cnn", "adamw")


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"ema": 0.9}, {"shards": 16}])
def test_settings_keep_the_bytes(settings: dict) -> None:
    changed = experiment("cnn", "sgd", **settings)
    assert train(changed, [Generation(1)]) == train(changed, [Generation(3)])


def test_a_compiled_model_keeps_the_bytes() -> None:
    changed = experiment("mlp", "sgd", compile=True)
    alone = Replica(changed, data.load(changed.data))  # here, where no deadline ends the compiler
    for _ in alone.epochs():
        pass
    two = train(changed, [Generation(2)])  # which finds on the disk what was compiled
    assert (two.digest, two.history) == (alone.state.digest, alone.state.history)
    assert two.digest != undisturbed("mlp", "sgd").digest, "nothing was compiled"


def test_augmented_images_keep_the_bytes() -> None:
    changed = experiment("resnet", "sgd", augment={"flip": True, "shift": 1, "erase": 2})
    generations = [Generation(3, Kill(1, 9, "forward")), Generation(2)]
    augmented = train(changed, [Generation(1)])
    assert train(changed, generations).sha256 == augmented.sha256
    assert train(experiment("resnet", "sgd"), [Generation(1)]).sha256 != augmented.sha256


def test_parameters_that_some_shards_do_not_use() -> None:
    changed = experiment("tests.nets:fork", "sgd")
    assert train(changed, [Generation(1)]) == train(changed, [Generation(4)])


def test_buffers_of_any_kind() -> None:
    changed = experiment("tests.nets:keeper", "sgd")
    whole = train(changed, [Generation(1)])
    assert whole == train(changed, [Generation(3)])
    assert whole.history[-1]["val_accuracy"] > 0.5


def test_buffers_change_as_they_do_in_one_shard() -> None:
    model = nets.keeper((1, 8, 8), 10)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    settings = Train(batch=4, shards=4, optimizer={"name": "sgd", "lr": 0.1})
    state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    step = TrainStep(
        state,
        settings,
        total_steps=9,
        loss=torch.nn.functional.cross_entropy,
        fetch=lambda step, shard: (torch.full((1, 1, 8, 8), float(shard)), torch.tensor([1])),
        device=torch.device("cpu"),
    )
    step.join(Peers())
    step.run()
    assert torch.equal(model.mask, before["mask"])
    assert torch.equal(model.turns, before["turns"])
    assert int(model.hash) == int(before["hash"]) + 2**33 + 1
    assert model.odd.tolist() == [False, True]
    assert torch.allclose(model.mean, torch.full((64,), 0.1 * (0 + 1 + 2 + 3) / 4))


def test_the_end_is_saved_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears of it may end this process."""
    folder = CheckpointFolder(str(tmp_path))
    saved: list[int] = []

    class Told(Fixed):
        def enter(self, profile: Any, progress: Any, *, done: bool = False) -> Any:
            if done:
                tensors, values = folder.load_last()
                saved.append((values["step"], len(values["history"])))
            return super().enter(profile, progress, done=done)

    write = CheckpointFolder.save

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr(CheckpointFolder, "save", slowly)
    asked = experiment("mlp", "sgd")
    replica = Replica(asked, data.load(asked.data), membership=Told(), checkpoints=folder)
    for _ in replica.epochs():
        pass
    assert saved == [(STEPS, 2)]


def test_early_stop_keeps_the_best_epoch_over_a_kill() -> None:
    changed = experiment("mlp", "sgd", epochs=40, early_stop={"patience": 1})
    whole = train(changed, [Generation(1)])
    killed = train(changed, [Generation(2, Kill(1, 30, "apply")), Generation(3)])
    assert 4 < len(whole.history) < 40
    assert (killed.sha256, killed.history) == (whole.sha256, whole.history)


@pytest.mark.parametrize(("model", "optimizer"), PAIRS)
def test_killed_and_resized_runs_end_with_the_same_bytes(model: str, optimizer: str) -> None:
    generations = schedule(PAIRS.index((model, optimizer)))
    outcome = train(experiment(model, optimizer), generations)
    expected = undisturbed(model, optimizer)
    assert outcome.sha256 == expected.sha256, generations
    assert (outcome.digest, outcome.history) == (expected.digest, expected.history)


def test_a_kill_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    outcome = train(
        experiment("mlp", "sgd"), [Generation(2, Kill(1, 8, "apply")), Generation(2)], tmp_path
    )
    assert outcome.restored[0] == 0
    assert 8 - 2 * 3 <= outcome.restored[1] <= 9  # rank 0 may have applied step 8 before the kill


@pytest.mark.parametrize("fault", ["threads", "swapped_sample"])
def test_controls_change_the_bytes(fault: str) -> None:
    # LayerNorm's gradients depend on the threads when there is enough to share out.
    settings = experiment("tests.nets:transformer", "sgd", batch=256, shards=4, epochs=4)
    settings = validate(
        {
            **settings.model_dump(mode="json"),
            "model": {"name": "tests.nets:transformer", "width": 64},
        }
    )
    assert train(settings, [Generation(1)], fault=fault).sha256 != _plain(settings)


def test_plain_data_parallelism_fails_the_same_comparison() -> None:
    settings = experiment("mlp", "sgd")
    settings = validate({**settings.model_dump(mode="json"), "model": {"name": "mlp"}})
    alone, two = (train(settings, [Generation(size)], fault="ddp") for size in (1, 2))
    assert alone.sha256 != two.sha256
    assert alone.history[-1] == pytest.approx(
        two.history[-1], rel=1e-3
    )  # the same but for the bits


@functools.cache
def _plain(settings: Experiment) -> str:
    return train(settings, [Generation(1)]).sha256


def test_silent_corruption_is_caught_and_named() -> None:
    with pytest.raises(AssertionError, match="different bytes at step 4, first in 1.weight"):
        train(experiment("mlp", "sgd"), [Generation(2)], fault="silent_corruption")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200))
def test_soak(seed: int) -> None:
    model, optimizer = PAIRS[seed % len(PAIRS)]
    generations = schedule(1000 + seed)
    outcome = train(experiment(model, optimizer), generations)
    expected = undisturbed(model, optimizer)
    assert (outcome.sha256, outcome.digest) == (expected.sha256, expected.digest), generations
