"""Sources, splits, preprocessing and order."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lepton_ray import data
from lepton_ray.config.schema import ImageData, Split, TableData
from lepton_ray.data import image_arrays, order
from lepton_ray.data.images import ImageError
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.split import divide
from lepton_ray.errors import DataError
from lepton_ray.serving import images
from lepton_ray.serving.requests import columns_of

DIGITS = ImageData(kind="image", source="sklearn:digits")


def table(tmp_path: Path, frame: pd.DataFrame, **settings) -> data.Dataset:
    frame.to_csv(tmp_path / "t.csv", index=False)
    return data.load(
        TableData(kind="table", source=str(tmp_path / "t.csv"), target="y", **settings)
    )


def people(n: int = 60) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": np.arange(n, dtype=float),
            "city": ["Bonn", "Rom", "Oslo"] * (n // 3),
            "y": ["yes", "no"] * (n // 2),
        }
    )


def test_digits_are_split_stratified_and_normalised() -> None:
    dataset = data.load(DIGITS)
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 1797
    assert dataset.train.x.shape[1:] == (1, 8, 8)
    assert abs(dataset.train.x.mean()) < 1e-4
    assert abs(dataset.train.x.std() - 1) < 1e-3
    shares = np.bincount(dataset.test.y) / len(dataset.test)
    np.testing.assert_allclose(shares, np.bincount(dataset.train.y) / len(dataset.train), atol=0.01)


def test_digest_changes_with_the_data_and_with_the_split() -> None:
    again = data.load(DIGITS)
    assert data.load(DIGITS).digest == again.digest
    other = DIGITS.model_copy(update={"split": Split(seed=1)})
    assert data.load(other).digest != again.digest


def test_table_columns_get_types_ranges_and_categories(tmp_path: Path) -> None:
    dataset = table(tmp_path, people())
    age, city = dataset.schema.columns
    assert (age.kind, city.kind) == ("number", "category")
    assert city.categories == ("Bonn", "Oslo", "Rom")
    assert dataset.preprocess.input_shape == (4,)
    assert dataset.schema.classes == ("no", "yes")


def test_unseen_category_is_all_zero(tmp_path: Path) -> None:
    fitted = table(tmp_path, people()).preprocess
    row = fitted.apply({"age": [30.0], "city": ["Atlantis"]})
    assert row[0, 1:].tolist() == [0, 0, 0]
    assert fitted.apply({"age": [30.0], "city": ["Oslo"]})[0, 1:].tolist() == [0, 1, 0]


def test_preprocessing_is_fitted_on_training_rows_only(tmp_path: Path) -> None:
    frame = people()
    dataset = table(tmp_path, frame)
    trained_on = np.concatenate([dataset.test_columns["age"]])
    assert dataset.schema.columns[0].low not in trained_on
    refit = dataset.preprocess.features[0].mean
    assert refit != pytest.approx(frame["age"].mean(), abs=1e-9)


def numbers(n: int = 60) -> pd.DataFrame:
    return pd.DataFrame({"a": np.arange(n, dtype=float), "y": 1000.0 + 3 * np.arange(n)})


def test_a_number_to_predict_is_scaled_by_the_training_split(tmp_path: Path) -> None:
    dataset = table(tmp_path, numbers(), task="regression")
    fitted = dataset.preprocess
    assert (dataset.schema.classes, dataset.schema.outputs) == ((), 1)
    assert fitted.target_mean == dataset.train.y.mean()
    assert fitted.target_deviation == dataset.train.y.std()
    together = np.concatenate([p.y for p in (dataset.train, dataset.validation, dataset.test)])
    assert sorted(together) == sorted(numbers()["y"])
    fitted.save(tmp_path)
    again = Preprocess.load(tmp_path)
    assert (again.target_mean, again.target_deviation) == (
        fitted.target_mean,
        fitted.target_deviation,
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["x", "7"] * 30, "30 of 60 values of target 'y' are not numbers, .*'x'"),
        ([np.inf, *range(59)], "1 of 60 values of target 'y' are not numbers"),
        ([5.0] * 60, "every 'y' is 5; there is nothing to learn"),
    ],
)
def test_targets_that_are_no_numbers_are_refused(tmp_path: Path, values: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        table(tmp_path, numbers().assign(y=values), task="regression")


def test_too_many_classes_point_to_regression(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1500 distinct values.*set data.task: regression"):
        table(tmp_path, numbers(1500))


@pytest.mark.parametrize("name", ["breast_cancer", "iris", "wine"])
def test_tables_of_scikit_learn_have_classes_by_name(name: str) -> None:
    dataset = data.load(TableData(kind="table", source=f"sklearn:{name}", target="target"))
    known = {"breast_cancer": "malignant", "iris": "setosa", "wine": "class_0"}
    assert known[name] in dataset.schema.classes
    with pytest.raises(DataError, match="'sklearn:boston' is not a table; known: breast_cancer"):
        data.load(TableData(kind="table", source="sklearn:boston", target="target"))


def test_preprocess_survives_its_file(tmp_path: Path) -> None:
    fitted = table(tmp_path, people()).preprocess
    fitted.save(tmp_path)
    columns = {"age": [1.0, 70.0], "city": ["Rom", "Bonn"]}
    np.testing.assert_array_equal(Preprocess.load(tmp_path).apply(columns), fitted.apply(columns))


def test_missing_numbers_are_refused_or_become_the_median(tmp_path: Path) -> None:
    frame = people()
    frame.loc[[3, 4, 5, 6], "age"] = np.nan
    with pytest.raises(DataError, match=r"'age' has no finite number in \d of \d+ rows.*median"):
        table(tmp_path, frame)
    dataset = table(tmp_path, frame, preprocess={"missing": "median"})
    assert np.isfinite(dataset.train.x).all()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.full((20, 4, 4), np.nan), "y": np.arange(20) % 2}, "20 of 20 images hold NaN"),
        ({"x": np.zeros((20, 4, 4)), "y": np.zeros(20)}, "nothing to learn"),
        ({"x": np.zeros((20, 4, 4)), "y": np.arange(19) % 2}, "20 images but 19 labels"),
        ({"x": np.zeros((0, 4, 4)), "y": np.zeros(0)}, "holds no samples"),
        ({"x": np.zeros((20, 16)), "y": np.arange(20) % 2}, "must be"),
        ({"a": np.zeros(3)}, "must hold x and y"),
    ],
)
def test_bad_images_are_refused(tmp_path: Path, arrays: dict, said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=said):
        data.load(ImageData(kind="image", source=str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    ("scale", "shift", "ends"),
    [(255, 0, (0, 255)), (1, 0, (0, 1)), (2, -1, (None, None)), (999, 0, (None, None))],
)
def test_an_array_of_images_has_the_range_of_its_numbers(
    tmp_path: Path, scale: float, shift: float, ends: tuple
) -> None:
    """A file that is sent to an endpoint is brought to it, or refused."""
    x = np.linspace(0, 1, 20 * 16).reshape(20, 4, 4) * scale + shift
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
    dataset = data.load(ImageData(kind="image", source=str(tmp_path / "a.npz")))
    (column,) = dataset.schema.columns
    assert (column.low, column.high) == ends
    white = io.BytesIO()
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(white, "PNG")
    if ends == (None, None):
        with pytest.raises(ImageError, match="no known range"):
            images.decode(column, white.getvalue())
    else:
        assert images.decode(column, white.getvalue()).max() == ends[1]
    asked = columns_of(dataset.schema, [{"image": image.tolist()} for image in x])
    assert len(asked["image"]) == 20, "it can be asked about what it was trained on"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=np.zeros((20, 4, 4)), y=np.arange(20) % 2)
    content = (tmp_path / "whole.npz").read_bytes()
    for number, damaged in enumerate((b"", content[:200], b"text")):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as .npz"):
            data.load(ImageData(kind="image", source=str(path)))
    head = b"\0\0\x08\x01" + (20).to_bytes(4, "big")
    packed = gzip.compress(head + bytes(20))
    for damaged, said in ((packed[:20], "cannot be read"), (gzip.compress(head), "holds 0 values")):
        for stem in image_arrays.IDX_FILES.values():
            (tmp_path / f"{stem}.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=said):
            data.load(ImageData(kind="image", source=str(tmp_path)))


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_table_of_a_header_only_is_named(tmp_path: Path, task: str) -> None:
    (tmp_path / "t.csv").write_text("a,y\n")
    with pytest.raises(DataError, match="holds no samples"):
        data.load(TableData(kind="table", source=str(tmp_path / "t.csv"), target="y", task=task))


def test_missing_data_says_where_it_looked() -> None:
    with pytest.raises(DataError, match="does not exist"):
        data.load(ImageData(kind="image", source="nowhere"))


def test_label_seen_only_in_the_test_split_is_refused() -> None:
    labels = np.array(["a"] * 20 + ["b"] * 20 + ["odd"])
    given_test = np.arange(41) >= 38
    with pytest.raises(DataError, match="'odd' occurs in the test split but never in the training"):
        divide(labels, Split(test="given"), given_test)


def test_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="the validation split is empty: 6 samples"):
        divide(np.array(["a", "b"] * 3), Split(test=0.1), None)


def test_table_refuses_ids_and_unknown_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [f"k{i}" for i in range(1100)], "a": 1.0, "y": ["p", "q"] * 550})
    with pytest.raises(DataError, match=r"looks like an id.*data.drop"):
        table(tmp_path, frame)
    assert [c.name for c in table(tmp_path, frame, drop=("id",)).schema.columns] == ["a"]
    with pytest.raises(DataError, match="no column 'z', known: a, id, y"):
        table(tmp_path, frame, drop=("z",))


@given(
    shards=st.integers(1, 9),
    per_shard=st.integers(1, 5),
    steps=st.integers(1, 4),
    extra=st.integers(0, 40),
    epoch=st.integers(0, 3),
)
def test_shards_of_an_epoch_see_every_whole_batch_once(
    shards: int, per_shard: int, steps: int, extra: int, epoch: int
) -> None:
    batch = shards * per_shard
    samples = steps * batch + extra % batch
    assert order.steps_per_epoch(samples, batch) == steps
    seen = [
        order.shard_indices(
            seed=3, epoch=epoch, step=i, shard=s, shards=shards, batch=batch, samples=samples
        )
        for i in range(steps)
        for s in range(shards)
    ]
    assert all(len(rows) == per_shard for rows in seen)
    everything = np.concatenate(seen)
    assert sorted(everything) == sorted(order.permutation(3, epoch, samples)[: steps * batch])


def test_order_is_a_distributed_sampler_of_the_same_permutation() -> None:
    perm = order.permutation(0, 0, 24)
    rows = order.shard_indices(seed=0, epoch=0, step=1, shard=2, shards=4, batch=8, samples=24)
    assert rows.tolist() == [perm[(1 * 2 + j) * 4 + 2] for j in range(2)]


def test_epochs_and_streams_have_orders_of_their_own() -> None:
    assert not np.array_equal(order.permutation(0, 0, 50), order.permutation(0, 1, 50))
    assert order.key(0, "a", 1) != order.key(0, "a", 2) != order.key(1, "a", 2)
