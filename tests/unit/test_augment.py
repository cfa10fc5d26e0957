"""Random changes of training images depend on seed, epoch and sample, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_ray.config import validate
from lepton_ray.config.schema import Augment
from lepton_ray.data.augment import augment, draws
from lepton_ray.errors import ExperimentError

IMAGES = np.random.default_rng(0).normal(size=(64, 2, 6, 5)).astype(np.float32)


def changed(**settings) -> np.ndarray:
    return augment(IMAGES, draws(0, 0, 64), Augment(**settings))


def test_half_of_the_images_are_mirrored() -> None:
    now = changed(flip=True)
    mirrored = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(now, IMAGES, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(now, IMAGES, strict=True)]
    assert sum(mirrored) + sum(same) == 64
    assert 20 < sum(mirrored) < 44


def test_a_shift_moves_the_whole_image_and_repeats_its_border() -> None:
    padded = np.pad(IMAGES, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    found = set()
    for number, now in enumerate(changed(shift=2)):
        options = {
            (down, right): padded[number, :, down : down + 6, right : right + 5]
            for down in range(5)
            for right in range(5)
        }
        (place,) = [at for at, image in options.items() if np.array_equal(image, now)]
        found.add(place)
    assert {down for down, _ in found} == {right for _, right in found} == set(range(5))


def test_a_square_becomes_the_mean() -> None:
    for now, before in zip(changed(erase=2), IMAGES, strict=True):
        gone = (now == 0).all(0)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert len(rows) in (1, 2)  # 1: cut off at the border
        assert len(columns) in (1, 2)
        assert gone.sum() == len(rows) * len(columns)
        assert np.array_equal(now[:, ~gone], before[:, ~gone])


def test_a_sample_is_changed_the_same_in_whatever_batch() -> None:
    settings = Augment(flip=True, shift=1, erase=3)
    whole = augment(IMAGES, draws(3, 1, 64), settings)
    part = augment(IMAGES[40:44], draws(3, 1, 64)[40:44], settings)
    assert np.array_equal(part, whole[40:44])


def test_every_epoch_and_every_seed_draws_anew() -> None:
    drawn = [draws(seed, epoch, 64) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not any(np.array_equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_only_images_are_augmented() -> None:
    raw = {
        "name": "t",
        "data": {"kind": "table", "source": "x.csv", "target": "y"},
        "model": {"name": "mlp"},
        "train": {"augment": {"flip": True}},
    }
    with pytest.raises(
        ExperimentError, match=r"augment changes images, but data.kind is table: leave it out"
    ):
        validate(raw)
