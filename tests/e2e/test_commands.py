"""The commands besides ``run``, on one registered version: their output, their exit codes, and
what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from lepton_ray.cli import main
from lepton_ray.jobs.embedded import PRELOAD_UP_TO
from tests.e2e.test_demo import COMMAND, DEADLINE_S, DIGITS, REPO, SPACE, Process, run

QUICK = ["--set=train.epochs=1", "--set=workers.min=1", "--set=workers.max=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``digits/1``, and what the command that made it printed."""
    folder = tmp_path_factory.mktemp("home")
    done = command(folder, "train", DIGITS, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    (folder / "train.json").write_text(done.stdout)
    (folder / "train.stderr").write_text(done.stderr)
    return folder


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Standard output and standard error apart."""
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE_S,
    )


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def row(value: float = 0.0) -> dict:
    return {"image": [[value] * 8] * 8}


def test_json_is_one_object_and_nothing_else(home: Path) -> None:
    printed = json.loads((home / "train.json").read_text())
    assert (home / "train.json").read_text().count("\n") == 1
    assert (home / "train.stderr").read_text() == ""
    assert (printed["register"]["name"], printed["register"]["version"]) == ("digits", 1)
    assert printed["train"]["epochs"] == 1

    listed = json.loads(command(home, "models", "list", "--json").stdout)
    (version,) = listed["models"]
    assert version["tags"]["lepton_ray.weights_sha256"] == printed["train"]["weights_sha256"]
    assert version["mlflow_run"] == printed["train"]["run_id"]
    assert version["aliases"] == [], "training alone promotes nothing"
    assert "digits/1" in command(home, "models", "list").stdout


def test_a_finished_training_is_not_resumed(home: Path) -> None:
    done = command(home, "train", DIGITS, *QUICK, "--resume")
    assert done.returncode == 2
    assert "nothing to resume: no unfinished 'train' of 'digits'" in done.stderr


def test_predict_writes_one_line_a_row(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row(v)) + "\n" for v in (0.0, 8.0, 16.0)))
    printed = command(home, "predict", "digits/1", str(data))
    assert printed.returncode == 0, printed.stderr
    answers = [json.loads(line) for line in printed.stdout.splitlines()]
    assert len(answers) == 3
    assert all(set(a) == {"label", "probabilities"} for a in answers)
    out = tmp_path / "out.jsonl"
    assert command(home, "predict", "digits/1", str(data), "-o", str(out)).returncode == 0
    assert out.read_text() == printed.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "digits/1", "wrong.jsonl"], "row 1, field 'image': the numbers of an image"),
        (["predict", "digits/1", "none.jsonl"], "'none.jsonl' does not exist"),
        (["predict", "digits/1", "train.stderr"], "must end with .csv, .parquet, .jsonl"),
        (["predict", "digits", "wrong.jsonl"], "NAME@ALIAS or NAME/VERSION"),
        (["models", "show", "digits@champion"], "digits has the aliases: none"),
        (["models", "show", "digits/2"], "digits has the aliases: none"),
        (["models", "show", "didgits/1"], "registered are: digits"),
        (["models", "show"], "models show needs a MODEL"),
        (["models", "list", "it's"], "registered are: digits"),
        (["models", "promote"], "models promote needs a MODEL, as in models promote digits/2"),
        (["models", "rollback", "digits"], "has no version before it to go back to"),
        (["models", "compare", "digits/1"], "as in models compare digits/1 digits/2"),
        (["serve", "digits@champion"], "lepton-ray models promote digits/VERSION makes one"),
        (["serve", "digits/1", "--set=train.epochs=2"], "serve changes its own settings only"),
        (["verify", "lepton_results"], "is not the folder of a run"),
        (["plan", "none.yaml"], "none.yaml:\n  cannot be read"),
    ],
)
def test_wrong_arguments_are_exit_2_and_say_why(
    home: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: what a process of its own loads is loaded sixteen times otherwise."""
    (home / "wrong.jsonl").write_text(f"{json.dumps(row())}\n{json.dumps(row(17.0))}\n")
    monkeypatch.chdir(home)
    code = main(arguments)
    printed = capsys.readouterr()
    assert (code, "Traceback" in printed.err) == (2, False), printed.err
    assert said in printed.err
    assert printed.out == ""


def test_serve_answers_until_it_is_stopped(home: Path, port: str) -> None:
    """By SIGTERM, as a service manager does; `test_demo` stops one with Ctrl-C."""
    made = command(home, "keys", "create", "web", "--file", "keys.json", "--json")
    key = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}
    served = Process(home, "serve", "digits/1", "--port", port, "--set=serve.keys=keys.json")
    served.wait_for(lambda: "keep   serving" in served.text())
    url = f"http://127.0.0.1:{port}"
    assert f"serve  digits/1 on {url}" in served.text()
    assert httpx.post(f"{url}/predict", json={"rows": [row()]}).status_code == 401
    answer = httpx.post(f"{url}/predict", json={"rows": [row()]}, headers=key).json()
    assert (answer["model"], answer["version"]) == ("digits", 1)

    code, text = run(home, "serve", "digits/1", "--port", port)
    assert code == 2, text
    assert f"port {port} on 127.0.0.1 cannot be used" in text

    served.process.send_signal(signal.SIGTERM)
    code, text = served.end()
    assert code == 0, text
    assert served.left() == []


@pytest.mark.parametrize("words", ["schema", "schema --json"])
def test_a_reader_that_goes_ends_a_command_quietly(words: str) -> None:
    line = f"{COMMAND} {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_killed_and_a_stopped_study_leave_nothing_and_go_on(tmp_path: Path) -> None:
    """Killed, and then SIGTERM, as a scheduler or `kill` sends it, in the middle of trials."""
    settings = ["--set=tune.trials=6", "--set=tune.scheduler=none", "--set=train.epochs=12", SPACE]
    results = tmp_path / "lepton_results" / "digits"

    def ended() -> int:
        return sum(p.read_text().count('"ended"') for p in results.glob("*/*/trials.jsonl"))

    killed = Process(tmp_path, "tune", DIGITS, *settings)
    killed.wait_for(ended)
    killed.process.kill()
    killed.end()
    before = ended()
    assert before < 5
    study = Process(tmp_path, "tune", DIGITS, *settings, "--resume")
    study.wait_for(lambda: ended() > before)
    study.process.send_signal(signal.SIGTERM)
    code, text = study.end()
    assert code == 130, text
    (said,) = [line for line in text.splitlines() if line.startswith("stopped; go on with: ")]
    assert study.left() == []
    words = said.removeprefix("stopped; go on with: lepton-ray ")
    again = subprocess.run(
        f"{COMMAND} {words} --json",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["tune"]["trials"] == 6
    more = command(tmp_path, "tune", DIGITS, *settings, "--add-trials=2", "--json")
    assert json.loads(more.stdout)["tune"]["trials"] == 8, more.stderr
    stands = json.loads(command(tmp_path, "status", "digits", "--json").stdout)
    stands = stands["studies"]["digits"]
    assert (stands["ended"], stands["closed"]) == (8, "all trials are done")
    taught = ["--set=tune.trials=1", "--from-study=digits", "--set=tune.seed=1"]
    found = command(tmp_path, "tune", DIGITS, *settings, *taught, "--json")
    journal = Path(json.loads(found.stdout)["run"]) / "study" / "trials.jsonl"
    known = [line for line in (tmp_path / journal).read_text().splitlines() if '"prior"' in line]
    assert len(known) == 8
    assert all(json.loads(line)["prior"]["comparable"] for line in known)
    assert killed.left() == []


def test_a_run_goes_on_while_its_storage_is_away_for_a_minute(tmp_path: Path) -> None:
    """Training does not wait for it, and what was to be written is written when it is back."""
    with contextlib.ExitStack() as stores:
        store = ThreadedMotoServer("127.0.0.1", port=0)
        store.start()
        stop = stores.enter_context(contextlib.ExitStack())
        stop.callback(store.stop)
        host, port = store.get_host_and_port()
        bucket = pafs.S3FileSystem(
            access_key="someone", secret_key="something", region="us-east-1", scheme="http",
            endpoint_override=f"{host}:{port}", allow_bucket_creation=True,
        )  # fmt: skip
        bucket.create_dir("lepton")

        def files() -> list[str]:
            everything = bucket.get_file_info(pafs.FileSelector("lepton", recursive=True))
            return [info.path for info in everything]

        def saved() -> list[int]:
            found = [re.search(r"checkpoints/step-(\d+)/manifest", path) for path in files()]
            return sorted(int(match[1]) for match in found if match)

        over = tmp_path / "over"
        training = Process(
            tmp_path, "train", DIGITS, "--set=storage=s3://lepton/results", "--set=workers.min=1",
            "--set=workers.max=1", "--set=train.epochs=60", "--set=train.checkpoint.every_s=1",
            "--set=model.name=tests.nets:sleepy", "--set=model.inner=cnn",
            "--set=model.pause_s=0.02", f"--set=model.until={over}", PYTHONPATH=str(REPO),
            AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="someone", AWS_SECRET_ACCESS_KEY="something",
        )  # fmt: skip

        def step() -> int:
            return max((int(n) for n in re.findall(r"step (\d+)/", training.text())), default=0)

        def away(seconds: float) -> bool:
            return time.monotonic() - began > seconds

        stores.callback(training.process.kill)  # where it did not end
        training.wait_for(lambda: saved() and step())
        stop.close()
        began = time.monotonic()
        training.wait_for(lambda: away(20))
        before = step()
        training.wait_for(lambda: away(60) and step() > before)
        again = ThreadedMotoServer(host, port=port)  # moto keeps what it holds in this process
        again.start()
        stores.callback(again.stop)
        over.touch()  # no more pauses
        code, text = training.end()
        assert code == 0, text
        total = int(re.findall(r"step \d+/(\d+)", text)[-1])
        assert saved()[-1] == total, "the last checkpoint"
        (state,) = [path for path in files() if path.endswith("/run.json")]
        assert json.loads(bucket.open_input_stream(state).read())["status"] == "finished"


def test_processes_of_a_training_have_loaded_torch_before_they_are_asked_for() -> None:
    code = """
import sys
import ray
from lepton_ray.jobs.session import session, session_beside

def loaded():
    return "torch" in sys.modules

for opened in (session_beside("json"), session()):
    with opened:
        print(ray.get(ray.remote(loaded).remote()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S
    )
    small = (os.cpu_count() or 1) <= PRELOAD_UP_TO
    assert done.stdout.split() == [str(small), "False"], done.stderr


def test_an_embedded_ray_waits_for_nothing_that_only_tells_of_it() -> None:
    """Its raylet waited 15 s for that process, and ended, where a machine had much to do."""
    code = """
import threading
import psutil
import ray
from lepton_ray.jobs.embedded import AGENT
from lepton_ray.jobs.session import session

found = []

def stop():
    while not found:
        for process in psutil.Process().children(recursive=True):
            try:
                if any(word.endswith(AGENT) for word in process.cmdline()):
                    found.append(process)
                    process.suspend()
            except psutil.Error:
                pass  # it has ended

threading.Thread(target=stop, daemon=True).start()
with session():
    answer = ray.get(ray.remote(lambda: "answered").remote())
    print(answer, *(process.status() for process in found))
    for process in found:
        process.resume()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout.split() == ["answered", "stopped"], done.stderr


def test_an_embedded_ray_has_no_dashboard_and_nobody_looks_for_one(tmp_path: Path) -> None:
    """Ray looks for 40 s where no address is found, and the end of a training waited for it."""
    code = f"""
from pathlib import Path
import ray
from ray.util.state import list_actors
from ray.util.state.exception import ServerUnavailable
from lepton_ray import data
from lepton_ray.jobs.session import session
from lepton_ray.training.trainer import train
from tests.ray.conftest import experiment

one = experiment(workers={{"min": 1, "max": 1}})
with session():
    dataset = ray.put(data.load(one.data))
    train(one, dataset, folder=Path("{tmp_path}"), checkpoints="{tmp_path}/checkpoints")
    try:
        list_actors(address=ray.get_runtime_context().gcs_address)
    except ServerUnavailable:
        print("refused")
    started = {{actor["ActorClassName"] for actor in ray._private.state.actors().values()}}
    print(*sorted(name.rpartition(".")[2] for name in started))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    refused, *started = done.stdout.split()
    assert refused == "refused", done.stdout
    assert started == ["Controller", "RayTrainWorker", "SynchronizationActor"]
