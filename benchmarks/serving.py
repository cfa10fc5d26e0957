"""The endpoint beside other servers: requests a second, tail latency, promotions, overload.

    python benchmarks/serving.py [--case CASE ...] [--arm ARM ...] [--resume] [--quick] [--json]

Every server answers the same bytes (one row of an 8 x 8 picture to an MLP, or of 28 x 28 to a CNN)
with the label and ten probabilities, has one replica or worker and one thread of torch or ONNX
Runtime, and runs on all cores but the last; the load comes from the last. Ours is what `lepton-ray
serve` starts: a key is checked, rows are validated, each request is logged, and a canary would be
routed. Peers are set up as their documentation says, access logs off; their answers are compared
with ours before they are timed. All are up at a time, and while one is timed the others' processes
are stopped (SIGSTOP): even idle, two clusters of Ray take a third of a core.

Cases: ``peak`` (wrk, 64 connections), ``tail`` (at 60 % of the weakest peer's peak, but Serve's
defaults, which break down on one core, each request timed from when it was to be sent),
``promotions`` (10 under load), ``overload`` (`CROWD` connections, which ask again at once when they
are sent away; good answers over those of the peak), ``explain`` (ours on all cores, at
`EXPLAIN_RATE`, with four callers that ask ``/explain`` all the time, and without; those callers are
nice, 19, as people who ask are on other machines). Results are appended to
``results/serving.jsonl``; ``--resume`` goes on with the last run there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
import _load
import _report
import psutil

HERE = Path(__file__).parent
PEERS = HERE / "peers"
KEPT = HERE / "results" / "serving.jsonl"
MODELS = ("mlp", "cnn")
CASES = ("peak", "tail", "promotions", "overload", "explain")
CROWD = 512
EXPLAIN_RATE = 200.0  # predictions a second
ARMS = ("ours", "serve_default", "fastapi", "fastapi_ort", "litserve", "bentoml", "mlflow")
OURS = sys.executable
START_S = 180.0


def python_of(peer: str) -> Path:
    """A peer's own environment, made when it is missing."""
    folder = PEERS / ".venvs" / peer
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        if not python.exists():
            venv.create(folder, with_pip=True)
        wanted = str(PEERS / f"{peer}.txt")
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
        done.touch()
    return python


class Bench:
    """A registry with two versions of each model, and what each arm is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        from lepton_ray.serving import keys

        self.keys = folder / "keys.json"
        key = keys.create(self.keys, "bench", ("predict", "explain"), None)
        self.headers = {"authorization": f"Bearer {key}"}
        for name in MODELS:
            self._register(name)

    def _register(self, name: str) -> None:
        import numpy as np
        from serving_models import SHAPES, make

        from lepton_ray import data
        from lepton_ray.config import render, validate
        from lepton_ray.serving import drift, package
        from lepton_ray.serving.signature import signature
        from lepton_ray.tracking import registry
        from lepton_ray.tracking.store import Tracker

        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (300, *SHAPES[name])).astype(np.float32)
        np.savez(self.folder / f"{name}.npz", x=x, y=np.arange(300) % 10)
        experiment = validate(
            {
                "name": f"bench-{name}",
                "data": {
                    "kind": "image",
                    "source": str(self.folder / f"{name}.npz"),
                    "preprocess": {"normalize": False},
                },
                "model": {"name": "cnn"},
                "serve": {"keys": str(self.keys)},
            }
        )
        dataset = data.load(experiment.data)
        for seed in (0, 1):
            folder = self.folder / f"{name}-{seed}" / "version"
            package.build(
                folder,
                model=make(name, seed),
                dataset_schema=dataset.schema,
                preprocess=dataset.preprocess,
                experiment_yaml=render(experiment),
                sample_x=dataset.test.x[:64],
                max_batch=64,
                provenance={"data_digest": dataset.digest, **drift.to_json(dataset.bins)},
            )
            version = registry.register(
                experiment.name,
                run_id=Tracker(experiment.name, self.folder).start("bench"),
                folder=folder,
                python_model=Path(package.__file__).with_name("pyfunc_model.py"),
                signature=signature(dataset.schema),
                tags={},
            )
            if seed == 0:
                registry.promote(version, instead_of=None)
        (self.folder / f"{name}.onnx").write_bytes(
            (self.folder / f"{name}-0" / "version" / "model.onnx").read_bytes()
        )
        image = package.rows(dataset.schema, dataset.test_columns, 1)[0]
        self.body(name, "rows").write_text(json.dumps({"rows": [image]}))
        self.body(name, "dataframe_records").write_text(json.dumps({"dataframe_records": [image]}))

    def body(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}.json"

    def command(self, arm: str, name: str, port: int) -> list[str]:
        number = str(port)
        ours = str(Path(OURS).with_name("lepton-ray"))
        fastapi = [str(PEERS / "serving_fastapi.py"), name]
        return {
            "ours": lambda: [ours, "serve", f"bench-{name}@champion", "--port", number],
            "serve_default": lambda: [OURS, str(PEERS / "serving_rayserve.py"), name, number],
            "fastapi": lambda: [str(python_of("fastapi")), *fastapi, "torch", number, "-"],
            "fastapi_ort": lambda: [
                str(python_of("fastapi")), *fastapi, "ort", number, str(self.folder)
            ],
            "litserve": lambda: [
                str(python_of("litserve")), str(PEERS / "serving_litserve.py"), name, number
            ],
            "bentoml": lambda: [
                str(python_of("bentoml").with_name("bentoml")), "serve", "serving_bentoml:Peer",
                "--port", number, "--host", "127.0.0.1",
            ],
            "mlflow": lambda: [
                str(Path(OURS).with_name("mlflow")), "models", "serve", "-m",
                f"models:/bench-{name}@champion", "--env-manager", "local", "--port", number,
                "--workers", "1",
            ],
        }[arm]()  # fmt: skip


class Server:
    """One arm's server, up and answering."""

    def __init__(self, bench: Bench, arm: str, name: str, *, pinned: bool = True) -> None:
        self.arm, self.name = arm, name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/{'invocations' if arm == 'mlflow' else 'predict'}"
        self.body = bench.body(name, "dataframe_records" if arm == "mlflow" else "rows")
        self.headers = bench.headers if arm == "ours" else {}
        self._log = (bench.folder / f"{arm}-{name}.log").open("w+")
        self._process = subprocess.Popen(
            [*(_load.pinned(last=False) if pinned else ()), *bench.command(arm, name, port)],
            cwd=PEERS if arm == "bentoml" else bench.folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                # MLflow looks for uvicorn there.
                "PATH": f"{Path(OURS).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(PEERS),
                "LEPTON_MODEL": name,
                "BENTOML_DO_NOT_TRACK": "true",
                "RAY_USAGE_STATS_ENABLED": "0",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: when it does not; with the end of what it said.
        """
        end = time.monotonic() + START_S
        while True:
            try:
                self.answer = self.ask()
                return
            except (OSError, ValueError) as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    self._log.seek(0)
                    said = self._log.read()[-3000:]
                    raise RuntimeError(f"{self.arm} does not answer: {error}\n{said}") from error
            time.sleep(0.5)

    def ask(self, route: str = "/predict") -> dict[str, Any]:
        request = urllib.request.Request(
            self.url.replace("/predict", route),
            self.body.read_bytes(),
            {"content-type": "application/json", **self.headers},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def label(self) -> str:
        found = self.answer
        found = found["predictions"][0] if isinstance(found, dict) else found[0]
        return str(found["label"])

    def peak(self, seconds: float, connections: int = 64) -> dict[str, float]:
        with self.awake():
            return _load.peak(self.url, self.headers, self.body, seconds, connections)

    def fixed(self, rate: float, seconds: float) -> dict[str, Any]:
        with self.awake():
            return _load.fixed(self.url, self.headers, self.body, rate, seconds)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """For the time of the block, a server that was stopped goes on; it is warm by then."""
        self.signal(signal.SIGCONT)
        try:
            self.wait()
            time.sleep(2.0)
            _load.peak(self.url, self.headers, self.body, 2.0)
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """To all of its processes, wherever they are: each is stopped before its children."""
        processes = []
        with suppress(psutil.NoSuchProcess):  # it did not start
            processes.append(psutil.Process(self._process.pid))
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                processes += process.children()

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


@contextmanager
def servers(bench: Bench, arms: list[str], name: str) -> Iterator[dict[str, Server]]:
    """All of them, started one after the other, their answers compared with each other; without a
    peer that does not start, which is told."""
    with ExitStack() as stack:
        made = {}
        for arm in arms:
            server = Server(bench, arm, name)
            stack.callback(server.end)
            try:
                server.wait()
            except RuntimeError as error:
                if arm == "ours":
                    raise
                print(f"left out: {error}", file=sys.stderr, flush=True)
                continue
            made[arm] = server
            server.signal(signal.SIGSTOP)
        labels = {arm: server.label() for arm, server in made.items()}
        if len(set(labels.values())) != 1:
            raise RuntimeError(f"servers answer differently to the same row: {labels}")
        yield made


class Results:
    """What was measured, kept as it comes."""

    def __init__(self, *, resume: bool, quick: bool, quiet: bool) -> None:
        KEPT.parent.mkdir(exist_ok=True)
        lines = KEPT.read_text().splitlines() if KEPT.exists() else []
        kept = [json.loads(line) for line in lines]
        if resume and kept:
            self.run = kept[-1]["run"]
        else:
            self.run = time.strftime("%Y%m%d-%H%M%S") + ("-quick" if quick else "")
        self.all = [entry for entry in kept if entry["run"] == self.run]
        self._quiet = quiet

    def find(self, case: str, model: str, arm: str) -> list[dict[str, Any]]:
        keys = {"case": case, "model": model, "arm": arm}
        return [e for e in self.all if all(e[k] == v for k, v in keys.items())]

    def add(self, case: str, model: str, arm: str, **found: Any) -> None:
        entry = {"run": self.run, "case": case, "model": model, "arm": arm, **found}
        self.all.append(entry)
        with KEPT.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if not self._quiet:
            print(json.dumps(entry), flush=True)


def side_by_side(
    bench: Bench, results: Results, cases: list[str], arms: list[str], *, quick: bool
) -> None:
    repeats, seconds = (2, 3.0) if quick else (5, 10.0)
    for name in MODELS:
        wanted = [("peak", arm) for arm in arms if "peak" in cases]
        wanted += [("tail", a) for a in arms if "tail" in cases and a != "serve_default"]
        wanted += [("overload", "ours")] if "overload" in cases else []
        if all(len(results.find(case, name, arm)) >= repeats for case, arm in wanted):
            continue
        with servers(bench, arms, name) as up:
            for repeat in range(repeats if {"peak", "overload"} & {*cases} else 0):
                for arm, server in up.items():
                    if ("peak", arm) in wanted and len(results.find("peak", name, arm)) <= repeat:
                        results.add("peak", name, arm, **server.peak(seconds))
                if "overload" in cases and len(results.find("overload", name, "ours")) <= repeat:
                    peak = up["ours"].peak(seconds)["rps"]
                    found = up["ours"].peak(seconds, CROWD)
                    results.add("overload", name, "ours", peak=peak, **found)
            peaks = {a: [e["rps"] for e in results.find("peak", name, a)] for a in up}
            if not all(peaks.values()):
                continue  # tails need the peak
            usual = {arm: statistics.median(values) for arm, values in peaks.items()}
            rate = 0.6 * min(usual[arm] for arm in up if arm != "serve_default")
            for repeat in range(repeats if "tail" in cases else 0):
                for arm, server in up.items():
                    if usual[arm] > rate and len(results.find("tail", name, arm)) <= repeat:
                        results.add("tail", name, arm, rate=rate, **server.fixed(rate, seconds))


def promotions(bench: Bench, results: Results, *, quick: bool) -> None:
    """10 of them while four callers ask; every answer is compared with the version it names."""
    from lepton_ray.serving.load import load_model
    from lepton_ray.tracking import registry

    if results.find("promotions", "cnn", "ours"):
        return
    name = "bench-cnn"
    rows = json.loads(bench.body("cnn", "rows").read_text())["rows"]
    expected = {
        v: [a.model_dump() for a in load_model(f"{name}/{v}").predict(rows)] for v in (1, 2)
    }
    counts, stop = {"asked": 0, "failed": 0, "wrong": 0}, threading.Event()
    lock = threading.Lock()
    versions: list[int] = []

    def call(server: Server) -> None:
        while not stop.is_set():
            failed = wrong = False
            try:
                said = server.ask()
                wrong = said["predictions"] != expected[said["version"]]
                versions.append(said["version"])
            except (OSError, ValueError):
                failed = True
            with lock:
                counts["asked"] += 1
                counts["failed"] += failed
                counts["wrong"] += wrong

    with servers(bench, ["ours"], "cnn") as up, up["ours"].awake():
        callers = [threading.Thread(target=call, args=(up["ours"],)) for _ in range(4)]
        for caller in callers:
            caller.start()
        took = []
        for number in range(10):
            old, new = (1, 2) if number % 2 == 0 else (2, 1)
            start = time.monotonic()
            registry.promote(registry.resolve(f"{name}/{new}"), instead_of=old)
            while len(versions) < 40 or set(versions[-40:]) != {new}:
                if time.monotonic() - start > 60:
                    raise RuntimeError(f"version {new} did not answer within 60 s")
                time.sleep(0.05)
            took.append(time.monotonic() - start)
        stop.set()
        for caller in callers:
            caller.join()
    results.add("promotions", "cnn", "ours", **counts, slowest_s=max(took))


def explaining(bench: Bench, results: Results, *, quick: bool) -> None:
    """Tails of predictions, each with and without explanations beside them."""
    repeats, seconds = (2, 3.0) if quick else (5, 15.0)
    stop = threading.Event()
    done: list[int] = []

    def call(server: Server) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not stop.is_set():
            with suppress(OSError, ValueError):  # a 429 is an answer too
                done.append(len(server.ask("/explain")["explanations"]))

    for name in MODELS:
        left = repeats - len(results.find("explain", name, "ours"))
        if left <= 0:
            continue
        server = Server(bench, "ours", name, pinned=False)
        try:
            server.wait()
            server.ask("/explain")  # starts what explains
            _load.peak(server.url, server.headers, server.body, 5.0)
            for _ in range(left):
                load = server.url, server.headers, server.body, EXPLAIN_RATE, seconds
                alone = _load.fixed(*load)
                stop.clear()
                done.clear()
                callers = [threading.Thread(target=call, args=(server,)) for _ in range(4)]
                for caller in callers:
                    caller.start()
                busy = _load.fixed(*load)
                stop.set()
                for caller in callers:
                    caller.join()
                tails = {"alone_p99_ms": alone["p99_ms"], "busy_p99_ms": busy["p99_ms"]}
                results.add("explain", name, "ours", **tails, explained=sum(done))
        finally:
            server.end()


def figures(results: Results, arms: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    found: dict[str, Any] = {}
    detail: dict[str, Any] = {}

    def column(case: str, name: str, arm: str, key: str) -> list[float]:
        return [e[key] for e in results.find(case, name, arm)]

    for arm in arms:
        ratios = {}
        for name in MODELS:
            ours, theirs = (column("peak", name, a, "rps") for a in ("ours", arm))
            if arm != "ours" and ours and len(ours) == len(theirs):
                ratios[name] = _report.ratio(ours, theirs)
        if ratios:
            detail[f"rps_vs_{arm}"] = ratios
            if arm == "fastapi":
                found |= {f"rps_vs_fastapi_{name}": r["median"] for name, r in ratios.items()}
            else:
                found[f"rps_vs_{arm}"] = min(r["median"] for r in ratios.values())
    tails = {}
    for name in MODELS:
        p99 = {a: column("tail", name, a, "p99_ms") for a in arms}
        p99 = {a: statistics.median(values) for a, values in p99.items() if values and all(values)}
        if "ours" in p99 and len(p99) > 1:
            best = min(value for arm, value in p99.items() if arm != "ours")
            tails[name] = {"ratio": p99["ours"] / best, "p99_ms": p99}
    if tails:
        found["p99_vs_best_peer"] = max(each["ratio"] for each in tails.values())
        detail["p99_vs_best_peer"] = tails
    for entry in results.find("promotions", "cnn", "ours"):
        found["failed_in_promotions"] = entry["failed"] + entry["wrong"]
        detail["failed_in_promotions"] = entry
    for name in MODELS:
        if both := results.find("explain", name, "ours"):
            busy, alone = ([e[f"{k}_p99_ms"] for e in both] for k in ("busy", "alone"))
            detail.setdefault("p99_with_explain_busy", {})[name] = _report.ratio(busy, alone)
    if ratios := detail.get("p99_with_explain_busy"):
        found["p99_with_explain_busy"] = max(each["median"] for each in ratios.values())
    goodput = {}
    for name in MODELS:
        if both := results.find("overload", name, "ours"):
            crowded, peak = ([e[key] for e in both] for key in ("rps", "peak"))
            goodput[name] = _report.ratio(crowded, peak)
    if goodput:
        found["goodput_overloaded"] = min(each["median"] for each in goodput.values())
        detail["goodput_overloaded"] = goodput
    return found, {**detail, "run": results.run}


def main() -> None:
    parser = _report.parser(__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--arm", action="append", choices=ARMS, help="default: all")
    parser.add_argument("--resume", action="store_true", help="go on with the last run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    cases = options.case or list(CASES)
    arms = ["ours", *(a for a in ARMS if a in (options.arm or ARMS) and a != "ours")]
    results = Results(resume=options.resume, quick=options.quick, quiet=options.json)
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        bench = Bench(Path(folder))
        if some := [case for case in cases if case in ("peak", "tail", "overload")]:
            side_by_side(bench, results, some, arms, quick=options.quick)
        if "promotions" in cases:
            promotions(bench, results, quick=options.quick)
        if "explain" in cases:
            explaining(bench, results, quick=options.quick)
    _report.finish(*figures(results, arms))


if __name__ == "__main__":
    main()
