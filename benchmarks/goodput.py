"""Steps kept over steps possible while spot nodes are taken away.

    python benchmarks/goodput.py [--summary] [--quick] [--json]

Three nodes of one CPU; at times drawn from an exponential distribution (mean 30 s, seeded) one of
them is lost without a notice, and another comes 10 s later; two may be away together, never all.
Arms: ours (live replicas), and Ray Train's elastic mode tuned by hand (see benchmarks/resize.py)
with a checkpoint every step and every 50. Steps of 0.1 s for 10 minutes (2 with ``--quick``),
counted from the first one. Goodput is the time that the steps themselves take, each counted once,
over the time that passed; every arm sees the same losses.

Each run is appended to ``results/goodput.jsonl`` and not done again.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _report
from resize import STEPS_S, TUNED, lines_of_rank_0, train_ours, train_ray

KEPT = Path(__file__).parent / "results" / "goodput.jsonl"
ARMS = {"ours": None, "ray_every_step": 1, "ray_every_50": 50}
NODES = 3
MEAN_S = 30.0
AWAY_S = 10.0
MEMORY = 100_000_000


def trace(seed: int, length_s: float) -> list[tuple[float, str, int]]:
    """(second, "lose" or "add", node): what happens to which of the nodes."""
    rng, at, back, events = random.Random(seed), 0.0, {}, []
    while True:
        at += rng.expovariate(1 / MEAN_S)
        if at > length_s:
            return sorted(events)
        here = [n for n in range(NODES) if back.get(n, 0.0) <= at]
        if len(here) < 2:
            continue
        node = rng.choice(here)
        back[node] = at + AWAY_S
        events += [(at, "lose", node), (at + AWAY_S, "add", node)]


def run_arm(arm: str, log: str, length_s: float) -> None:
    """One cluster, one training, one trace. Runs in its own process."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY}
    )

    def node() -> Any:
        return cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    nodes = [node() for _ in range(NODES)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:

        def train() -> None:
            if arm == "ours":
                steps = int(length_s / STEPS_S * 2)
                train_ours(log, steps, Path(folder), workers=NODES, step_s=STEPS_S)
            else:
                every = ARMS[arm]
                assert every is not None
                train_ray(log, folder, workers=NODES, tuned=True, save_every=every)

        training = threading.Thread(target=train, daemon=True)
        training.start()
        while not Path(log).exists():
            time.sleep(0.1)
        start = time.time()
        for at, what, number in trace(0, length_s):  # here: Ray starts nodes in the main thread
            time.sleep(max(0.0, start + at - time.time()))
            if what == "lose":
                cluster.remove_node(nodes[number], allow_graceful=False)
            else:
                nodes[number] = node()
        time.sleep(max(0.0, start + length_s - time.time()))
        Path(f"{log}.over").write_text(f"{start} {time.time()}")
        Path(f"{log}.stop").touch()
        training.join(60)
    ray.shutdown()
    cluster.shutdown()


def measure(arm: str, length_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/steps"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(Path(__file__).parent),
            **(TUNED if arm != "ours" else {}),
        }
        command = [sys.executable, __file__, "--arm", arm, log, str(length_s)]
        done = subprocess.run(
            command, env=environment, timeout=length_s + 240, capture_output=True, text=True
        )
        if not Path(f"{log}.over").exists():
            raise RuntimeError(f"{arm} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        start, end = map(float, Path(f"{log}.over").read_text().split())
        lines = [line for line in lines_of_rank_0(log) if float(line[0]) < end]
    took = [float(b[0]) - float(a[0]) for a, b in itertools.pairwise(lines)]
    steps = [int(line[1]) for line in lines]
    redone = sum(max(0, a + 1 - b) for a, b in itertools.pairwise(steps))
    kept = max(steps) - min(steps)
    return {
        "goodput": kept * STEPS_S / (end - start),
        "steps": kept,
        "redone": redone,
        "usual_s": statistics.median(took),
        "longest_s": max(took),
        "losses": sum(what == "lose" for _, what, _ in trace(0, length_s)),
    }


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        run_arm(sys.argv[2], sys.argv[3], float(sys.argv[4]))
        return
    parser = _report.parser(__doc__)
    parser.add_argument("--summary", action="store_true", help="only of the runs that are kept")
    options = parser.parse_args()
    kept = not options.quick and KEPT.exists()
    runs = [json.loads(line) for line in KEPT.read_text().splitlines()] if kept else []
    for arm in ARMS:
        if options.summary or any(run["arm"] == arm for run in runs):
            continue
        runs.append({"arm": arm, **measure(arm, 120.0 if options.quick else 600.0)})
        if not options.quick:
            with KEPT.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
        if not options.json:
            print(json.dumps(runs[-1]), flush=True)
    goodput = {run["arm"]: run["goodput"] for run in runs}
    _report.finish(
        {
            "goodput": goodput["ours"],
            **{
                f"goodput_vs_{arm}": goodput["ours"] / goodput[arm] for arm in ARMS if arm != "ours"
            },
        },
        {"runs": runs},
    )


if __name__ == "__main__":
    main()
