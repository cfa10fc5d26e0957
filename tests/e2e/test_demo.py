"""The main job as a person runs it: real processes, real HTTP, real kill -9."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from lepton_ray.tuning.journal import Journal

REPO = Path(__file__).parents[2]
DIGITS = str(REPO / "experiments" / "digits.yaml")
COMMAND = str(Path(sys.executable).with_name("lepton-ray"))
SPACE = (
    "--set=tune.space={train.optimizer.lr: {loguniform: [1e-3, 3e-2]}, "
    "model.width: {choice: [4, 8]}}"
)
SMALL = ["--set=tune.trials=4", "--set=train.epochs=30", "--set=gate.at_least=0.5", SPACE]
DEADLINE_S = 900  # of one wait; a machine that does other things too is several times slower


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"--set=serve.port={free.getsockname()[1]}"


class Process:
    """A command in a session of its own, so that what it leaves behind can be seen."""

    started: ClassVar[list[Process]] = []

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [COMMAND, *arguments],
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.started.append(self)

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended: {self.text()}"
            assert time.monotonic() < end, f"too late: {self.text()}"
            time.sleep(0.1)

    def end(self) -> tuple[int, str]:
        return self.process.wait(DEADLINE_S), self.text()

    def text(self) -> str:
        return self.output.read_text()

    def session(self) -> list[str]:
        """Commands of the living processes of the session, Ray's own included."""
        listing = subprocess.run(
            ["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True
        )
        lines = [line.split(None, 2) for line in listing.stdout.splitlines()]
        mine = str(self.process.pid)
        return [line[2] for line in lines if line[0] == mine and not line[1].startswith("Z")]

    def left(self) -> list[str]:
        """What lives on after the end, once it has had time to notice: the agents of a killed Ray
        take most of a minute."""
        end = time.monotonic() + 120
        while (found := self.session()) and time.monotonic() < end:
            time.sleep(0.2)
        return found


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    return Process(folder, *arguments, **environment).end()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # set_tracking_uri would leave it set
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


def runs(store: MlflowClient, kind: str) -> list:
    (experiment,) = [e for e in store.search_experiments() if e.name == "digits"]
    return store.search_runs([experiment.experiment_id], f"tags.`lepton_ray.kind` = '{kind}'")


def test_the_demo(tmp_path: Path, port: str, store: MlflowClient) -> None:
    demo = Process(tmp_path, "run", DIGITS, "--keep", port)
    demo.wait_for(lambda: "keep   serving" in demo.text())
    text = demo.text()
    curl = re.search(r"curl -s .*", text)
    assert curl, text
    answer = subprocess.run(curl.group(), shell=True, capture_output=True, text=True, check=True)
    (prediction,) = json.loads(answer.stdout)["predictions"]
    assert prediction["label"] in "0123456789"
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    demo.process.send_signal(signal.SIGINT)
    code, text = demo.end()
    assert code == 0, text
    assert demo.left() == []
    for word in ("plan   digits", "tune   best of 12 trials", "score  on 359", "gate   passed"):
        assert word in text
    assert "32 test samples over HTTP equal" in text
    accuracy = float(re.search(r"cnn \(version 1\) +\S+ +(\S+)", text).group(1))
    assert accuracy > 0.97, "a linear model gets 0.97 here"

    (study,) = runs(store, "study")
    children = runs(store, "trial")
    (training,) = runs(store, "training")
    assert len(children) == 12
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {study.info.run_id}
    assert {r.info.status for r in (study, training)} == {"FINISHED"}
    ended = {"finished": "FINISHED", "pruned": "KILLED"}
    assert all(c.info.status == ended[c.data.tags["lepton_ray.state"]] for c in children)
    files = {f.path for f in store.list_artifacts(study.info.run_id, "report")}
    assert {"report/report.html", "report/history.png"} <= files
    assert f"the same bytes as in trial {study.data.tags['best.trial']}" in text
    assert training.data.tags["lepton_ray.study"] == study.info.run_id
    assert training.data.params["train.optimizer.name"] == "adamw"
    assert training.data.params["model.width"] == study.data.tags["best.model.width"]
    assert len(store.get_metric_history(training.info.run_id, "val_loss")) == 18
    assert training.data.metrics["test_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert {"experiment.yaml"} <= {f.path for f in store.list_artifacts(training.info.run_id)}
    assert len(training.data.tags["lepton_ray.data_digest"]) == 64
    version = store.get_model_version_by_alias("digits", "champion")
    assert int(version.version) == 1
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    loaded = mlflow.pyfunc.load_model("models:/digits@champion")
    row = json.loads(re.search(r"-d '(.*)'", text).group(1))["rows"][0]
    assert loaded.predict(pd.DataFrame([row]))["label"].tolist() == [prediction["label"]]

    code, text = run(tmp_path, "models", "show", "digits@champion", "--json")
    assert (
        json.loads(text)["manifest"]["weights_sha256"] == version.tags["lepton_ray.weights_sha256"]
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, text = run(tmp_path, "predict", "digits/1", "rows.jsonl")
    assert json.loads(text)["label"] == prediction["label"]
    (folder,) = (tmp_path / "lepton_results" / "digits").iterdir()
    code, text = run(tmp_path, "verify", str(folder), "--workers", "1")
    assert code == 0, text
    assert "equal  " in text


def test_a_missed_gate_is_exit_1_and_promotes_nothing(
    tmp_path: Path, port: str, store: MlflowClient
) -> None:
    code, text = run(
        tmp_path,
        *("run", DIGITS, port, "--json"),
        *("--set=tune=null", "--set=train.epochs=1", "--set=gate.at_least=1.0"),
    )
    assert code == 1
    error, answer = text.splitlines()[0], json.loads(text.splitlines()[-1])
    assert "accuracy >= 1: missed by 0." in answer["error"]
    assert answer["kind"] == "GateError"
    assert error.startswith("error: digits/1 has accuracy")
    assert store.get_registered_model("digits").aliases == {}


@pytest.mark.soak  # `test_commands` kills a study, `test_jobs` a training; this is both in one run
def test_killed_in_the_study_and_stopped_in_training_it_goes_on(
    tmp_path: Path, port: str, store: MlflowClient
) -> None:
    settings = [*SMALL, "--set=train.checkpoint.every_steps=20", port]
    first = Process(tmp_path, "run", DIGITS, *settings)
    results = tmp_path / "lepton_results" / "digits"
    first.wait_for(
        lambda: any('"ended"' in p.read_text() for p in results.glob("*/*/trials.jsonl"))
    )
    first.process.kill()
    first.end()
    (folder,) = results.iterdir()
    finished = {r.id for r in Journal(folder / "study").finished}

    second = Process(tmp_path, "run", DIGITS, *settings, "--resume")
    second.wait_for(lambda: any(folder.glob("checkpoints/*/manifest.json")))
    second.process.send_signal(signal.SIGINT)
    code, text = second.end()
    assert code == 130, text
    assert f"stopped; go on with: lepton-ray run {DIGITS}" in text
    assert second.left() == []
    journal = Journal(folder / "study")
    assert len(journal.finished) == 4
    assert finished <= {r.id for r in journal.finished}, "what was finished is not done again"

    code, text = run(tmp_path, "run", DIGITS, *settings, "--resume")
    assert code == 0, text
    assert "tune   done before" in text
    assert "resumed at step" in text or "train  done before" in text
    assert len(runs(store, "study")) == len(runs(store, "training")) == 1
    assert runs(store, "study")[0].info.status == "FINISHED"
    assert first.left() == [], "a killed driver leaves nothing"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set=train.epocs=3"], "unknown key 'epocs', did you mean 'epochs'?"),
        (["--set=train.batch=many"], "train.batch: input should be a valid integer"),
        (["--set=data.source=nowhere"], "data.source 'nowhere' does not exist"),
        (["--address=127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1'"),
    ],
)  # fmt: skip
def test_bad_input_is_exit_2_and_says_why(
    tmp_path: Path, port: str, arguments: list[str], said: str
) -> None:
    code, text = run(tmp_path, "run", DIGITS, port, *arguments)
    assert (code, "Traceback" in text) == (2, False), text
    assert said in text
    results = tmp_path / "lepton_results" / "digits"
    assert not results.exists(), "nothing was started"


def test_a_taken_port_and_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        code, text = run(tmp_path, "run", DIGITS, f"--set=serve.port={number}")
        assert code == 2
        assert f"port {number} on 127.0.0.1 cannot be used" in text
    code, text = run(tmp_path, "plan", DIGITS, MLFLOW_TRACKING_URI="sqlite:////no/where/m.db")
    assert code == 2
    assert "/no/where does not exist" in text


def test_plan_changes_nothing_and_json_is_one_object(tmp_path: Path) -> None:
    code, text = run(tmp_path, "plan", DIGITS, "--json")
    assert code == 0
    assert json.loads(text.splitlines()[-1])["samples"]["test"] == 359
    assert not (tmp_path / "lepton_results").exists()
