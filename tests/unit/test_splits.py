"""Splits by groups and by time, and the signs of a leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from lepton_ray import data
from lepton_ray.config.schema import Split, TableData
from lepton_ray.data.split import divide
from lepton_ray.errors import DataError

N = 200


def visits(**changed: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {
        "patient": np.repeat(np.arange(N // 4), 4),
        "pressure": rng.normal(120, 15, N),
        "day": pd.date_range("2021-01-01", periods=N).strftime("%Y-%m-%d"),
        "y": rng.permutation(["ill", "well"] * (N // 2)),
    }
    return pd.DataFrame(columns | changed)


def load(tmp_path: Path, frame: pd.DataFrame, **settings: Any) -> data.Dataset:
    frame.to_csv(tmp_path / "t.csv", index=False)
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": "y", **settings}
    return data.load(TableData.model_validate(section))


@given(
    st.lists(st.integers(0, 12), min_size=30, max_size=200).filter(lambda g: len(set(g)) > 5),
    st.integers(0, 5),
)
def test_no_group_is_in_two_splits(groups: list[int], seed: int) -> None:
    names = np.array(groups)
    split = Split(test=0.3, validation=0.3, seed=seed, group="g")
    try:
        parts = divide(np.zeros(len(groups)), split, None, groups=names)
    except DataError:  # so few groups that a split is empty
        reject()
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(groups)))
    sides = [set(names[rows]) for rows in parts.values()]
    assert sum(map(len, sides)) == len(set(groups))


def test_groups_come_near_to_the_share_and_are_no_feature(tmp_path: Path) -> None:
    dataset = load(tmp_path, visits(), split={"test": 0.25, "group": "patient"})
    assert len(dataset.test) == pytest.approx(N / 4, abs=4)
    assert "patient" not in {c.name for c in dataset.schema.columns}


def test_by_time_the_latest_rows_are_the_test(tmp_path: Path) -> None:
    frame = visits().sample(frac=1, random_state=0)
    settings = {"types": {"day": "date"}, "split": {"test": 0.2, "time": "day"}}
    dataset = load(tmp_path, frame, **settings)
    days = dataset.test_columns["day"]
    assert (len(days), min(days)) == (40, "2021-06-10")
    assert len(dataset.validation) == pytest.approx(16, abs=1)
    assert not any("backwards" in note for note in dataset.notes)


def test_where_nearly_all_rows_have_the_earliest_time_it_is_told() -> None:
    times = np.array([2023.0] * 85 + [2024.0] * 15)
    with pytest.raises(DataError, match="85 samples have the same time"):
        divide(np.arange(100.0), Split(test=0.2, time="t"), None, times=times)


def test_rows_of_one_time_stay_together() -> None:
    times = np.array([1.0] * 10 + [2.0] * 10 + [3.0] * 10)
    split = Split(test=0.2, validation=0.2, time="t")
    parts = divide(np.arange(30.0), split, None, times=times)
    assert {name: set(times[rows]) for name, rows in parts.items()} == {
        **{"train": {1.0}, "validation": {2.0}, "test": {3.0}},
    }


@pytest.mark.parametrize(
    ("frame", "split", "said"),
    [
        (visits(), {"group": "pacient"}, "no column 'pacient' to split by .data.split.group., did"),
        (
            visits(patient=[None, *range(N - 1)]),
            {"group": "patient"},
            "1 of 200 rows have no 'patient', by which they are to be split",
        ),
        (visits(day="2021-01-01"), {"time": "day"}, "every row has the same time '2021-01-01'"),
        (visits(day="spring"), {"time": "day"}, "must hold dates .* but row 0 has 'spring'"),
    ],
)
def test_columns_that_cannot_split_are_named(
    tmp_path: Path, frame: pd.DataFrame, split: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(tmp_path, frame, split=split)


def test_a_split_is_by_one_thing() -> None:
    with pytest.raises(ValueError, match="by group or by time, but got group 'a' and time 'b'"):
        Split(group="a", time="b")
    with pytest.raises(ValueError, match="target and split.time must be two columns"):
        TableData(kind="table", source="t.csv", target="y", split=Split(time="y"))


def warned(dataset: data.Dataset) -> list[str]:
    return [note for note in dataset.notes if note.startswith("warning: ")]


def test_clean_data_get_no_warning(tmp_path: Path) -> None:
    assert warned(load(tmp_path, visits(), split={"time": "day"})) == []


def test_rows_in_both_splits_are_told(tmp_path: Path) -> None:
    frame = visits().drop(columns="day")
    (told,) = warned(load(tmp_path, pd.concat([frame, frame])))
    assert "test rows are in the training split too, but for the target" in told
    assert "data.split.group" in told


@pytest.mark.parametrize(
    "leak",
    [
        lambda frame: frame["y"].map({"ill": "A", "well": "B"}),
        lambda frame: np.where(frame["y"] == "ill", 1.0, 0.0),
        lambda frame: np.where(frame["y"] == "ill", 1000.0, 0.0) + np.arange(N),
    ],
)
def test_a_column_that_says_the_target_is_told(tmp_path: Path, leak: Any) -> None:
    frame = visits()
    (told,) = warned(load(tmp_path, frame.assign(code=leak(frame)), split={"time": "day"}))
    assert "column 'code' alone tells the target in every training row" in told
    assert "data.drop: [code]" in told


def test_a_number_that_is_the_target_in_another_unit_is_told(tmp_path: Path) -> None:
    frame = visits(y=np.random.default_rng(1).normal(50, 9, N))
    frame["cents"] = frame["y"] * 100 + 3
    dataset = load(tmp_path, frame, task="regression", split={"time": "day"})
    assert ["'cents'" in told for told in warned(dataset)] == [True]


def test_time_that_runs_backwards_is_told(tmp_path: Path) -> None:
    (told,) = warned(load(tmp_path, visits()))
    assert "time runs backwards: by 'day'," in told
    assert "data.split.time: day" in told


def test_groups_that_the_source_splits_are_told(tmp_path: Path) -> None:
    frame = visits(part=["train", "train", "train", "test"] * (N // 4)).drop(columns="day")
    split = {"test": "given", "column": "part", "group": "patient"}
    (told,) = warned(load(tmp_path, frame, split=split))
    assert "values of 'patient' are in the training and in the test split" in told
