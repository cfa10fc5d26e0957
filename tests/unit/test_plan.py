"""What a plan refuses before anything is started, and what it finds."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch._inductor.config

from lepton_ray.cli import main
from lepton_ray.config import validate
from lepton_ray.config.schema import Replicas, Serve, Workers
from lepton_ray.errors import ClusterError, DataError, ExperimentError, StoreError, TrainingError
from lepton_ray.jobs import embedded, session
from lepton_ray.jobs.planning import make_plan
from lepton_ray.training import exactness
from tests import stores

DIABETES = {"kind": "table", "source": "sklearn:diabetes", "target": "target"}
SMALL = {
    "name": "plan",
    "data": {"kind": "image", "source": "sklearn:digits", "split": {"test": 0.7}},
    "model": {"name": "mlp", "width": 8},
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stores.new(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def store(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


def plan(**sections):
    return make_plan(validate({**SMALL, **sections}))[0]


def test_a_plan_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.chdir(tmp_path)
    plan()
    assert not list(tmp_path.iterdir())


def test_a_plan_tries_a_real_step() -> None:
    found = plan(train={"epochs": 2, "batch": 64})
    assert found.samples == {"train": 486, "validation": 53, "test": 1258}
    assert found.steps == 2 * (486 // 64)
    assert 2.0 < found.loss < 3.0
    assert found.metrics == ("train_loss", "val_loss", "val_accuracy", "val_f1_macro")
    assert "486 train" in found.table()


@pytest.mark.parametrize(
    ("sections", "error", "said"),
    [
        ({"model": {"name": "cnnn"}}, ExperimentError, "did you mean 'cnn'"),
        ({"model": {"name": "mlp", "widht": 3}}, ExperimentError, "did you mean 'width'"),
        ({"model": {"name": "cnn", "blocks": 9}}, ExperimentError, "9 blocks need images of 512"),
        ({"model": {"name": "no.such:thing"}}, ExperimentError, "No module named"),
        ({"train": {"optimizer": {"name": "adm"}}}, ExperimentError, "did you mean 'adam'"),
        ({"train": {"optimizer": {"name": "lbfgs"}}}, ExperimentError, "no optimizer 'lbfgs'"),
        ({"train": {"optimizer": {"beta": 1}}}, ExperimentError, "takes no 'beta', did you mean"),
        ({"train": {"batch": 512}}, DataError, "only 486 samples: set a smaller batch"),
        ({"train": {"early_stop": {"metric": "val_los"}}}, ExperimentError, "'val_loss'"),
        ({"gate": {"metric": "acuracy"}}, ExperimentError, "did you mean 'accuracy'"),
        (
            {"data": {**DIABETES, "task": "regression"}},
            ExperimentError,
            "gate.metric: 'accuracy' is not measured, known: .*mae",
        ),
        (
            {"tune": {"metric": "val_auc", "space": {"train.batch": {"choice": [32]}}}},
            ExperimentError,
            "tune.metric: 'val_auc' is never reported",
        ),
        (
            {"tune": {"space": {"train.optimizer.lrr": {"uniform": [0, 1]}}}},
            ExperimentError,
            "names no setting, did you mean 'train.optimizer.lr'",
        ),
        (
            {"tune": {"space": {"train.batch": {"choice": [32, 33]}}}},
            ExperimentError,
            "tune.space.train.batch: 33: .*batch must be a multiple of shards",
        ),
        ({"workers": {"min": 4, "max": 4, "cpus": 99}}, ClusterError, "CPU are missing"),
        ({"workers": {"gpus": 1, "cpus": 1}}, ClusterError, "1 GPU are missing"),
        ({"model": {"name": "tests.nets:scatter"}}, ExperimentError, "set train.exact: false"),
        ({"model": {"name": "tests.nets:synchronized"}}, ExperimentError, "is SyncBatchNorm"),
        ({"model": {"name": "tests.nets:doubles"}}, ExperimentError, "weights must be float32"),
        ({"model": {"name": "tests.nets:explode"}}, TrainingError, "this model cannot be trained"),
    ],
)
def test_refused(sections: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plan(**sections)


def test_a_store_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////no/such/folder/mlflow.db")
    with pytest.raises(StoreError, match="/no/such/folder does not exist"):
        plan()


def test_processors_that_compute_unlike_each_other_are_named() -> None:
    kinds = {"Maker avx2 fma": ["10.0.0.1"], "Maker amx_bf16 avx2 fma": ["10.0.0.2", "10.0.0.3"]}
    said = "without those at 10.0.0.1; amx_bf16 at 10.0.0.2, 10.0.0.3.*set train.exact: false"
    with pytest.raises(ClusterError, match=said):
        session.check_alike(kinds, "the cluster")
    session.check_alike({"Maker avx2 fma": ["10.0.0.1", "10.0.0.2"]}, "the cluster")


def test_inexact_training_allows_what_exact_training_does_not() -> None:
    plan(model={"name": "tests.nets:scatter"}, train={"exact": False})


def test_a_compiled_model_needs_a_compiler() -> None:
    # A width that no other test compiles: torch would take it from its cache.
    nowhere = torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/g++")})
    said = r"train.compile: .* needs a C\+\+ compiler .*g\+\+.* or set train.compile: false"
    with nowhere, pytest.raises(ExperimentError, match=said):
        plan(model={"name": "mlp", "width": 5}, train={"compile": True})


def test_a_compiled_model_needs_pythons_headers() -> None:
    said = RuntimeError("C++ compile error\nfatal error: Python.h: No such file or directory")
    with pytest.raises(ExperimentError, match="python3-dev"), exactness.naming_causes("here"):
        raise said


def test_what_a_model_prints_is_no_part_of_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps({**SMALL, "model": {"name": "tests.nets:chatty"}}))
    assert main(["plan", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["samples"]["train"] == 486
    assert "a person's own line" in printed.err


def test_a_plan_for_a_cluster_that_need_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aws = str(Path(__file__).parents[2] / "cluster" / "aws.yaml")
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps({**SMALL, "workers": {"min": 10, "max": 20, "spot": True}}))
    asked = ["plan", str(file), "--cluster", aws]
    assert main([*asked, "--set=train.shards=32", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fit"]["machines"] == {"head": 1, "cpu": 2, "cpu_spot": 2}
    assert planned["fit"]["usd"] > 0
    too_large = [*asked, "--set=train.shards=64", "--set=workers.min=40", "--set=workers.max=40"]
    assert main(too_large) == 2
    assert "workers.min=40 of 1 CPU each does not fit" in capsys.readouterr().err


def test_a_cluster_that_grows_is_planned_with_what_it_may_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws = Path(__file__).parents[2] / "cluster" / "aws.yaml"
    assert session.possible({"CPU": 2.0}) == {"CPU": 2.0}, "one that does not grow"
    monkeypatch.setenv("LEPTON_CLUSTER_FILE", str(aws))
    room = session.possible({"CPU": 0.0})
    assert (room["CPU"], room["spot CPU"], room["GPU"]) == (4 * 8 + 12 * 8 + 4 * 4, 112, 4)
    session.check_room(Workers(min=32, max=40, spot=True), room, "the cluster")
    with pytest.raises(ClusterError, match="40 CPU, the cluster has 32 on nodes that are not spot"):
        session.check_room(Workers(min=40, max=40, spot=True), room, "the cluster")
    monkeypatch.setenv("LEPTON_CLUSTER_FILE", str(aws.with_name("onprem.yaml")))
    session.check_room(Workers(min=99, max=99), session.possible({"CPU": 4.0}), "the cluster")


def test_replicas_on_gpus_need_a_cluster_that_has_them() -> None:
    halves = Serve(gpus=0.5, replicas=Replicas(min=3, max=8))
    session.check_gpus(halves, {"GPU": 2.0})
    session.check_gpus(Serve(), {"CPU": 1.0})
    with pytest.raises(ClusterError, match="needs 1.5 GPU for the first replicas.* has 1:"):
        session.check_gpus(halves, {"GPU": 1.0})
    with pytest.raises(ClusterError, match="needs 0.5 GPU .* has 0: .*serve.gpus=0"):
        session.check_gpus(Serve(gpus=0.5, replicas=Replicas(min=0, max=1)), {"CPU": 8.0})


def test_a_ray_that_does_not_start_is_told_with_where_its_log_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(embedded.ray, "init", init)
    held = contextlib.ExitStack()
    with held, pytest.raises(ClusterError, match=r"timed out during startup.*session_latest/logs"):
        embedded.start(held, {}, trains=False)
