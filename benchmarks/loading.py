"""Whether data hold training up, and what reading a large file takes.

    python benchmarks/loading.py [--case NAME] [--quick] [--json]

- ``loader_over_training_images``, ``..._tables``: samples/s of the loader alone (order, rows,
  augmentation, tensors) over those of training, same steps, one process of one thread, in turns.
  The images are 28x28, mirrored and shifted, for a CNN of width 32; the rows of the table have 40
  numbers, for an MLP of width 128. At least 5 is wanted.
- ``csv_memory_gb``: the most memory that a fresh process has of its own while it reads, splits and
  prepares a CSV of 1 GB (`--quick`: 100 MB) of 8 numbers and 4 categories of 20 texts. What is
  mapped from disk is not counted, because the system takes it back when it is short; ``peak_gb``
  under ``detail`` has that too.
- ``cluster_over_own``: how many times as fast the same file is prepared by a Ray cluster of all
  processors here as by one process, in turns; and the most memory that the driver has then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _report

CASES = ("images", "tables", "csv", "cluster")
ROWS = 200_000  # generated at a time
READ = """
import json, resource, sys, threading, time

def own_kb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

most = 0
def watch():
    global most
    while True:
        most = max(most, own_kb())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
from lepton_ray import data
from lepton_ray.config import validate
section = {"kind": "table", "source": sys.argv[1], "target": "y"}
asked = validate({"name": "large", "data": section, "model": {"name": "mlp"}})
hands = None
if sys.argv[2] == "cluster":
    import os, ray
    from lepton_ray.jobs.hands import ClusterHands
    from lepton_ray.terminal import Silent
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    hands = ClusterHands(Silent())
start = time.monotonic()
dataset = data.load(asked.data, hands=hands)
rows = sum(map(len, (dataset.train, dataset.validation, dataset.test)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {"gb": most / 1e6, "peak_gb": peak / 1e6, "rows": rows, "digest": dataset.digest}
print(json.dumps(found | {"seconds": time.monotonic() - start}))
"""


def replica(images: bool, samples: int) -> Any:
    """A training on one process, not begun."""
    import numpy as np
    from elastic import dataset

    from lepton_ray.config import validate
    from lepton_ray.training.loop import Replica

    raw: dict[str, Any] = {
        "name": "loading",
        "data": {"kind": "image", "source": "unused"},
        "model": {"name": "cnn", "width": 32},
        "train": {"epochs": 100, "batch": 256, "augment": {"flip": True, "shift": 2}},
    }
    data = dataset(samples)
    if not images:
        raw["model"] = {"name": "mlp", "width": 128}
        del raw["train"]["augment"]
        rows = np.random.default_rng(0).standard_normal((samples, 1, 5, 8)).astype(np.float32)
        object.__setattr__(data.train, "x", rows)
        object.__setattr__(data.preprocess.columns[0], "shape", (5, 8))
    return Replica(validate(raw), data)


def loader_over_training(images: bool, repeats: int, steps: int) -> dict[str, Any]:
    """Their rates, in turns over the same number of steps."""
    import torch

    torch.set_num_threads(1)
    trained = replica(images, 256 * 100)
    fetch, shards = trained._step._fetch, trained.experiment.train.n_shards
    now = 0

    def load() -> None:
        nonlocal now
        for shard in range(shards):
            fetch(now, shard)
        now += 1

    def rate(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return steps * 256 / (time.perf_counter() - start)

    arms = {"loader": lambda: rate(load), "training": lambda: rate(trained.advance)}
    for run in arms.values():
        run()
    rates = _report.interleaved(arms, repeats)
    each = {f"{name}_samples_per_s": values for name, values in rates.items()}
    return _report.ratio(rates["loader"], rates["training"]) | each


def prepared(path: Path, by: str) -> dict[str, Any]:
    """What a fresh process took to prepare a CSV, with the hands of a cluster or its own."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), by],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"file_gb": path.stat().st_size / 1e9}


def csv_memory(size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.csv"
        write_csv(path, size)
        return prepared(path, "own")


def cluster_over_own(size: int, repeats: int) -> dict[str, Any]:
    """Their seconds; each makes the same of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.csv"
        write_csv(path, size)
        runs: dict[str, list[dict[str, Any]]] = {"own": [], "cluster": []}
        for _ in range(repeats):
            for by, done in runs.items():
                done.append(prepared(path, by))
    assert len({run["digest"] for done in runs.values() for run in done}) == 1
    seconds = {by: [run["seconds"] for run in done] for by, done in runs.items()}
    return _report.ratio(seconds["own"], seconds["cluster"]) | runs


def write_csv(path: Path, size: int) -> None:
    """Of at least so many bytes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv as pc

    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        while file.tell() < size:
            columns: dict[str, Any] = {f"n{i}": rng.normal(size=ROWS).round(6) for i in range(8)}
            for i in range(4):
                columns[f"c{i}"] = np.char.add("kind", rng.integers(0, 20, ROWS).astype(str))
            columns["y"] = np.where(columns["n0"] > 0, "yes", "no")
            options = pc.WriteOptions(include_header=not file.tell())
            pc.write_csv(pa.table(columns), pa.PythonFile(file, "w"), options)


def main() -> None:
    parser = _report.parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="only this one")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    detail: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for case in [options.case] if options.case else CASES:
        if case == "csv":
            detail[case] = csv_memory(100_000_000 if options.quick else 1_000_000_000)
            figures["csv_memory_gb"] = detail[case]["gb"]
        elif case == "cluster":
            size, repeats = (200_000_000, 1) if options.quick else (1_000_000_000, 3)
            detail[case] = cluster_over_own(size, repeats)
            figures["cluster_over_own"] = detail[case]["median"]
        else:
            repeats, steps = (3, 20) if options.quick else (7, 60)
            detail[case] = loader_over_training(case == "images", repeats, steps)
            figures[f"loader_over_training_{case}"] = detail[case]["median"]
        if not options.json:
            print(case, json.dumps(detail[case]), flush=True)
    _report.finish(figures, detail)


if __name__ == "__main__":
    main()
