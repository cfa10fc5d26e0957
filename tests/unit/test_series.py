"""Series: from a file of values over time to windows, a version and a forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lepton_ray import data, models
from lepton_ray.config import render, validate
from lepton_ray.config.load import loads
from lepton_ray.config.schema import Experiment, Model, SeriesData
from lepton_ray.data import fitted as fitted_
from lepton_ray.data.series.clock import Clock, guess
from lepton_ray.data.series.load import Windows
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.pipeline import checks
from lepton_ray.serving import package
from lepton_ray.serving.requests import RowsError, columns_of
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training import baselines, forecasts
from lepton_ray.training.loop import Replica
from tests import apps
from tests.elastic import Generation, Kill, train

HISTORY, HORIZON, DAYS = 24, 6, 30


def frame(hours: int = 24 * DAYS, level: float = 100.0) -> pd.DataFrame:
    """A wave of a day, higher on some days that are known before, with a little noise."""
    rng = np.random.default_rng(0)
    times = pd.date_range("2024-01-01", periods=hours, freq="h")
    hour = np.arange(hours)
    fair = (hour // 24 % 5 == 0).astype(float)
    cars = level * (1 + 0.5 * np.sin(2 * np.pi * hour / 24) + 0.4 * fair)
    rain = rng.random(hours)
    return pd.DataFrame(
        {
            "when": times.strftime("%Y-%m-%d %H:%M:%S"),
            "cars": cars + rng.normal(0, level / 50, hours),
            "fair": fair,
            "rain": rain,
        }
    )


def section(path: Path, **settings: Any) -> dict[str, Any]:
    return {
        "kind": "series",
        "source": str(path),
        "time": "when",
        "target": "cars",
        "history": HISTORY,
        "horizon": HORIZON,
        "covariates": {"known": ["fair"], "past": ["rain"]},
        **settings,
    }


def load(path: Path, made: pd.DataFrame | None = None, **settings: Any) -> data.Dataset:
    (frame() if made is None else made).to_csv(path, index=False)
    return data.load(SeriesData.model_validate(section(path, **settings)))


def experiment(path: Path, model: dict[str, Any], epochs: int = 1, **settings: Any) -> Experiment:
    return validate(
        {
            "name": "cars",
            "data": section(path, **settings),
            "model": model,
            "train": {
                "epochs": epochs,
                "batch": 64,
                "shards": 4,
                "optimizer": {"name": "adamw", "lr": 0.01},
                "digest_every": 2,
            },
            "gate": {"metric": "mae"},
        }
    )


MODELS = [
    {"name": "nbeats", "width": 32, "blocks": 2, "dropout": 0.0},
    {"name": "tcn", "width": 12, "dropout": 0.0},
]

# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_every_file_gives_the_same_windows(tmp_path: Path, suffix: str) -> None:
    path, made = tmp_path / f"s{suffix}", frame(24 * 12)
    made[["cars", "rain"]] = made[["cars", "rain"]].round(3)
    if suffix == ".csv":
        made.to_csv(path, index=False)
    elif suffix == ".parquet":
        made.assign(when=pd.to_datetime(made.when)).to_parquet(path)
    else:
        made.to_json(path, orient="records", lines=True, double_precision=15)
    dataset = data.load(SeriesData.model_validate(section(path)))
    assert dataset.digest == load(tmp_path / "other.csv", made).digest


def _swap(made: pd.DataFrame) -> pd.DataFrame:
    return made.iloc[[1, 0, *range(2, len(made))]]


def _repeat(made: pd.DataFrame) -> pd.DataFrame:
    return made.iloc[[0, 0, 0, *range(1, len(made))]]


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (_swap, {}, "times must rise, but 2024-01-01 01:00:00 is followed by 2024-01-01 00:00:00"),
        (_repeat, {}, "2 of 290 times are repeated, the first is 2024-01-01 00:00:00: keep one"),
        (lambda f: f.drop(index=[7, 8]), {}, "2 of 288 times have no value, .* 2024-01-01T07:00"),
        (lambda f: f.assign(cars=f.cars.where(f.index != 5)), {}, "1 of 288 times have no value"),
        (
            lambda f: f.assign(rain=f.rain.where(f.index != 5)),
            {},
            "covariate 'rain' has no value at 1 of 288 times",
        ),
        (
            lambda f: f.assign(cars=f.cars.astype(object).where(f.index != 5, "many")),
            {},
            "1 of 288 values of 'cars' are not finite numbers, the first is 'many' in row 5",
        ),
        (
            lambda f: f.assign(when=f.when.where(f.index != 5, "noon")),
            {},
            "1 of 288 times in 'when' are no dates, the first is 'noon' in row 5",
        ),
        (
            lambda f: f.assign(when=f.when.where(f.index != 5, "01/02/2024 05:00")),
            {},
            "the first is '01/02/2024 05:00' in row 5: write all of them as 2024-01-31",
        ),
        (
            lambda f: f.assign(when=f.when.where(f.index != 5, "2024-01-01 05:20:00")),
            {},
            "must be h apart, but 2024-01-01T05:20:00 lies between two",
        ),
        (lambda f: f.assign(when=f.index), {}, "must be dates, .* but are numbers, such as 0"),
        (lambda f: f.assign(cars=3.0), {}, "every 'cars' of the training part is 3"),
        (lambda f: f.iloc[:28], {}, r"history \+ horizon = 24 \+ 6 .* longest series has 28"),
        (lambda f: f, {"horizon": 300}, r"history \+ horizon = 24 \+ 300 .* has 288"),
        (lambda f: f, {"horizon": 100}, "the validation part holds no window of 100 values"),
        (lambda f: f, {"split": {"test": "2031-01-01"}}, "but validation begins at .* and test at"),
        (lambda f: f, {"frequency": "often"}, "data.frequency must be whole seconds or months"),
        (lambda f: f, {"target": "car"}, "no column 'car', did you mean 'cars'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, change: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(tmp_path / "s.csv", change(frame(288)), **settings)


def test_a_share_is_no_number_of_seconds() -> None:
    with pytest.raises(ValueError, match="must be a share between 0 and 1, or a time, but got 20"):
        SeriesData.model_validate(section(Path("s.csv"), split={"test": 20}))


def test_what_the_settings_name_is_done_and_told(tmp_path: Path) -> None:
    made = frame(288)
    shuffled = pd.concat([made, made.iloc[[3]].assign(cars=9.0)]).drop(index=[50]).iloc[::-1]
    how = {"unsorted": "sort", "gaps": "mask"}
    for kept, value in (("first", 9.0), ("last", made.cars[3]), ("mean", (9 + made.cars[3]) / 2)):
        dataset = load(tmp_path / "s.csv", shuffled, preprocess={**how, "repeated": kept})
        assert isinstance(dataset.train, Windows)
        assert dataset.train.track.values[3] == pytest.approx(value)
        assert np.isnan(dataset.train.track.values[50])
        assert any("1 of 288 rows repeat a time" in note for note in dataset.notes)
        assert any("1 of 288 times have no value and are masked" in n for n in dataset.notes)
    filled = load(
        tmp_path / "s.csv", made.drop(index=[50]), preprocess={"gaps": "last"}
    ).train.track
    assert filled.values[50] == pytest.approx(made.cars[49])
    assert filled.past[50, 0] == pytest.approx(made.rain[49])


def test_frequencies() -> None:
    def times(*texts: str) -> Any:
        return np.array(texts, "datetime64[s]")

    assert guess(times("2024-01-01", "2024-01-02", "2024-01-03", "2024-01-07")) == "D"
    assert guess(times("2024-01-01T00:00", "2024-01-01T00:15", "2024-01-01T00:30")) == "15min"
    months = times("2024-01-05", "2024-02-05", "2024-03-05", "2024-05-05")
    assert guess(months) == "MS"
    assert Clock("MS").positions(months).tolist() == [0, 1, 2, 4]
    assert str(Clock("MS").shift(months[:1], 13)[0]) == "2025-02-05T00:00:00"
    assert Clock("7D").step_s == 7 * 86_400
    assert Clock("h").calendar(times("2024-01-01T06:00")).shape == (1, Clock("h").features)


# --- windows -------------------------------------------------------------------------------------


def test_no_window_forecasts_across_two_parts(tmp_path: Path) -> None:
    dataset = load(tmp_path / "s.csv", split={"test": "2024-01-25", "validation": "2024-01-20"})
    bounds = np.array(["2024-01-01", "2024-01-20", "2024-01-25", "2024-01-31"], "datetime64[s]")
    whole = 0
    for number, part in enumerate((dataset.train, dataset.validation, dataset.test)):
        assert isinstance(part, Windows)
        times = part.times(np.arange(len(part)))
        assert times.min() >= bounds[number]
        assert times.max() < bounds[number + 1]
        whole += len(np.unique(times))
    assert whole == 24 * DAYS - HISTORY, "every hour after the first history is forecast in a part"
    scaled = dataset.train.fitted.tensors["mean"][0]
    made = frame()
    assert scaled == pytest.approx(made.cars[: 24 * 19].mean()), "of the training part only"


@pytest.mark.parametrize(("gaps", "told"), [("mask", 0.0), ("last", 1.0)])
def test_a_request_s_gap_is_told_as_in_training(tmp_path: Path, gaps: str, told: float) -> None:
    made = frame(288).drop(index=[30])
    dataset = load(tmp_path / "s.csv", made, preprocess={"gaps": gaps})
    dataset.preprocess.save(tmp_path)
    (row,) = package.rows(dataset.schema, dataset.test_columns, 1)
    row["cars"] = [*row["cars"][:-1], None]
    for fitted in (dataset.preprocess, fitted_.load(tmp_path)):
        x = fitted.apply(columns_of(dataset.schema, [row]))
        assert x[0, 1, :HISTORY].tolist() == [1.0] * (HISTORY - 1) + [told]
        assert x[0, 0, HISTORY - 1] == x[0, 0, HISTORY - 2], "the value before it"


def test_a_window_holds_what_it_says(tmp_path: Path) -> None:
    made = frame(288).drop(index=[30])
    dataset = load(tmp_path / "s.csv", made, preprocess={"gaps": "mask"})
    fitted, train_ = dataset.preprocess, dataset.train
    assert isinstance(train_, Windows)
    rows = np.array([7])  # hours 7 to 30 and then 31 to 36
    x, y = train_.batch(rows, 0)
    mean, deviation = fitted.tensors["mean"][0], fitted.tensors["deviation"][0]
    cars = frame(288).cars.to_numpy()
    assert x.shape == (1, *fitted.input_shape)
    assert x.dtype == np.float32
    expected = (np.r_[cars[7:30], cars[29]] - mean) / deviation
    np.testing.assert_allclose(x[0, 0, :HISTORY], expected, rtol=1e-5)
    assert x[0, 1].tolist() == [1.0] * 23 + [0.0] + [0.0] * HORIZON, "measured, missing, to come"
    assert (x[0, [0, 3], HISTORY:] == 0).all(), "values and past covariates stop at the horizon"
    assert len(set(x[0, 4, :].tolist())) == 2, "the fair is known of all times"
    np.testing.assert_allclose(y[0], (cars[31:37] - mean) / deviation, rtol=1e-5)
    sent = {name: values[rows + 0] for name, values in _columns(dataset.train).items()}
    np.testing.assert_array_equal(fitted.apply(sent), x)


def _columns(windows: Any) -> dict[str, Any]:
    from lepton_ray.data.series.load import columns_of

    return columns_of(windows)


def test_windows_take_no_room(tmp_path: Path) -> None:
    import pickle

    few = len(pickle.dumps(load(tmp_path / "s.csv", frame(288)).train.track))
    many = len(pickle.dumps(load(tmp_path / "s.csv", frame(288), history=96).train.track))
    assert few == many


# --- metrics and baselines -----------------------------------------------------------------------


def test_what_was_not_measured_has_no_part_in_loss_and_metrics(tmp_path: Path) -> None:
    outputs = torch.tensor([[1.0, 5.0], [2.0, 2.0]])
    y = torch.tensor([[0.0, torch.nan], [2.0, 4.0]])
    assert float(forecasts.loss(outputs, y)) == pytest.approx(1.0)
    assert float(forecasts.loss(outputs, y * torch.nan)) == 0.0
    gaps = frame().drop(index=range(700, 705))
    test = load(tmp_path / "s.csv", gaps, preprocess={"gaps": "mask"}).test
    truth = test.y[:]
    off = forecasts.measure(np.nan_to_num(truth) + 10.0, test)
    assert np.isnan(truth).any()
    assert off["mae"] == pytest.approx(10.0)
    assert off["rmse"] == pytest.approx(10.0)
    naive = test.fitted.tensors["naive"][0]
    assert off["mase"] == pytest.approx(10.0 / naive)
    assert {"mae_h1", "mae_h6"} < off.keys()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["name"])
def test_a_model_beats_the_seasonal_mean(tmp_path: Path, model: dict[str, Any]) -> None:
    dataset = load(tmp_path / "s.csv")
    made = experiment(tmp_path / "s.csv", model, epochs=20)
    *_, last = Replica(made, dataset).epochs()
    measured = baselines.measure(dataset, 0)
    assert measured.keys() == {"baseline", "linear", "boosting"}
    assert last["val_mae"] < measured["baseline"]["mae"] * 0.6


def test_several_series_have_their_own_scale(tmp_path: Path) -> None:
    small, large = frame(288).assign(road=7), frame(288, level=5000.0).assign(road="A1")
    mixed = pd.concat([small, large])
    dataset = load(tmp_path / "s.csv", mixed, id="road")
    fitted = dataset.preprocess
    assert fitted.ids == ("7", "A1")
    assert fitted.tensors["mean"][1] > 20 * fitted.tensors["mean"][0]
    measured = baselines.measure(dataset, 0)
    assert measured["boosting"]["mase"] < 3
    runtime = apps.version(
        tmp_path / "v", dataset, Model(name="nbeats", width=8, blocks=1), "roads"
    )
    rows = package.rows(dataset.schema, dataset.test_columns, 2)
    answered = runtime.predict([*rows, {**rows[0], "road": "A1"}])
    assert max(answered[0].values) < 1000 < min(answered[2].values)
    with pytest.raises(RowsError, match=r"'road': must be one that .* trained on \(7, A1\), but"):
        runtime.predict([{**rows[0], "road": "A2"}])


# --- exactness -----------------------------------------------------------------------------------


def test_replicas_that_are_killed_do_not_change_a_byte(tmp_path: Path) -> None:
    frame(288).to_csv(tmp_path / "s.csv", index=False)
    wanted = experiment(tmp_path / "s.csv", {"name": "tcn", "width": 8}, epochs=2)
    alone = train(wanted, [Generation(1)])
    killed = train(wanted, [Generation(3, Kill(1, 1, "start")), Generation(2)])
    assert (killed.sha256, killed.history) == (alone.sha256, alone.history)


# --- versions and answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, data.Dataset]:
    folder = tmp_path_factory.mktemp("cars")
    dataset = load(
        folder / "s.csv", frame(288).drop(index=range(222, 226)), preprocess={"gaps": "mask"}
    )
    return apps.version(folder / "v", dataset, Model(name="tcn", width=8), "cars"), dataset


def test_a_window_is_answered_with_a_list_of_numbers(cars: tuple[Runtime, data.Dataset]) -> None:
    runtime, dataset = cars
    rows = package.rows(dataset.schema, dataset.test_columns, 12)
    assert any(None in row["cars"] for row in rows), "a gap is null in JSON"
    app = apps.app(runtime)
    answered = app.post("/predict", json={"rows": rows})
    assert answered.status_code == 200, answered.text
    values = [answer["values"] for answer in answered.json()["predictions"]]
    assert np.array(values).shape == (12, HORIZON)
    assert values == [answer.values for answer in runtime.predict(rows)]
    assert checks.score(runtime, dataset)["mae"] > 0
    later = {**rows[0], "when": "2024-01-11T12:00:00+02:00"}
    utc = {**rows[0], "when": "2024-01-11 10:00"}
    assert runtime.predict([later]) == runtime.predict([utc]), "an offset is taken in UTC"
    assert runtime.predict([utc]) != runtime.predict([rows[0]]), "the calendar counts"
    v2 = app.get("/v2/models/cars").json()
    assert {t["name"]: t["shape"] for t in v2["inputs"]}["cars"] == [-1, HISTORY]
    assert v2["outputs"] == [{"name": "values", "datatype": "FP64", "shape": [-1, HORIZON]}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cars": [1.0] * 23}, r"must be a list of 24 numbers or null, the latest last \(this has"),
        ({"cars": [None] * 24}, "must have at least one number"),
        ({"cars": [1.0] * 23 + ["x"]}, r"\('x' is none\)"),
        ({"cars": 3.0}, "must be a list of 24 numbers or null"),
        ({"fair": [0.0] * 24}, r"must be a list of 30 numbers, the latest last \(this has 24\)"),
        ({"rain": [None] + [0.0] * 23}, r"\(this has 1 gaps\)"),
        ({"when": "noon"}, "must be a time, such as 2024-01-31T13:00"),
        ({"when": 5}, "must be a time"),
        ({"when": "01/03/2020"}, "must be a time"),
        ({"cars": None}, "must be a list"),
    ],
)
def test_a_window_that_is_wrong_is_named(
    cars: tuple[Runtime, data.Dataset], change: dict[str, Any], said: str
) -> None:
    runtime, dataset = cars
    (row,) = package.rows(dataset.schema, dataset.test_columns, 1)
    with pytest.raises(RowsError, match=said):
        runtime.predict([{**row, **change}])


def test_a_csv_body_is_refused_since_a_row_holds_lists(cars: tuple[Runtime, data.Dataset]) -> None:
    app = apps.app(cars[0])
    answered = app.post("/predict", content="when\n1\n", headers={"content-type": "text/csv"})
    assert answered.status_code == 415


def test_a_rendered_experiment_reads_back_equal(tmp_path: Path) -> None:
    made = experiment(tmp_path / "s.csv", MODELS[0], split={"test": "2024-01-25"})
    assert loads(render(made)) == made


def test_models_of_other_data(tmp_path: Path) -> None:
    dataset = load(tmp_path / "s.csv", frame(288))
    shape, facts = dataset.preprocess.input_shape, dataset.preprocess.facts
    with pytest.raises(ExperimentError, match="text_cnn takes texts only: set one of .*nbeats"):
        models.build(Model(name="text_cnn"), shape, HORIZON, facts)
    x = torch.from_numpy(dataset.test.x[:2])
    plain = models.build(Model(name="linear"), shape, HORIZON, facts)
    assert plain(x).shape == (2, HORIZON), "a window is numbers like any"
