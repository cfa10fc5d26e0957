"""How long training stands still while a replica joins, against the size of the state it takes.

    python benchmarks/joining.py [--quick] [--json]

Two live replicas train a chain of square layers with AdamW, so that weights and moments are of the
size asked for; when they have done some steps a third one joins. Arms: the state in parts, one at
each step boundary while the others train on (as it is), and at once, while the others wait (the
limit of `lepton_ray.training.joining.PART_BYTES` set beyond it). ``stood_s`` is the longest time
between two steps that the two spent on the join: forming the new group and handing over; steps say
how long they take before the third comes. All processes share the machine's cores.

``join_at_once_over_parts`` is the ratio of the two at the largest state, ``join_stood_s`` and
``join_stood_steps`` the median of ours there, in seconds and in steps.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _report
import elastic
import torch

SIDE = 1024  # of a layer: 4.2 MB of weights, 12.6 MB with moments
BEFORE, AFTER = 5, 5  # steps before the third comes, and after it holds the state
SECRET = b"of this benchmark"


def chain(input_shape: tuple[int, ...], classes: int, *, layers: int) -> torch.nn.Module:
    """Square layers; what it learns does not matter."""
    parts: list[torch.nn.Module] = [torch.nn.Flatten(), torch.nn.Linear(28 * 28, SIDE)]
    for _ in range(layers):
        parts += [torch.nn.ReLU(), torch.nn.Linear(SIDE, SIDE)]
    return torch.nn.Sequential(*parts, torch.nn.Linear(SIDE, classes))


def _replica(number: int, address: Any, layers: int, part_bytes: int | None, pipe: Any) -> None:
    """Sends the seconds of each step, and of what lies between steps."""
    from lepton_ray.training import joining
    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership.live import Live

    joining.PART_BYTES = part_bytes or joining.PART_BYTES
    between: list[float] = []
    depth = [0]
    for name in ("_join", "_take_in"):
        setattr(Replica, name, _timing(getattr(Replica, name), between, depth))
    asked = elastic.experiment(
        {"name": "joining:chain", "layers": layers},
        batch=4,
        shards=4,
        optimizer={"name": "adamw", "lr": 1e-4},
    )
    membership = Live(address, SECRET, id=str(number), guaranteed=True, host="127.0.0.1")
    enter = membership.enter
    come = [number == 2]

    def when_told(*arguments: Any, **named: Any) -> Any:
        if come.pop() if come else False:
            pipe.send("ready")
            pipe.recv()
        return enter(*arguments, **named)

    membership.enter = when_told  # type: ignore[method-assign]
    replica = Replica(asked, elastic.dataset(4 * 2000), membership=membership)
    while True:
        between.clear()
        began = time.perf_counter()
        replica.advance()
        seconds = time.perf_counter() - began
        pipe.send((replica.peers.size, replica.peers.hosts, seconds, sum(between)))


def _timing(method: Any, seconds: list[float], depth: list[int]) -> Any:
    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        depth[0] += 1
        try:
            return method(*arguments, **named)
        finally:
            depth[0] -= 1
            if not depth[0]:  # `_take_in` within `_join` counts once
                seconds.append(time.perf_counter() - began)

    return timed


def join(layers: int, part_bytes: int | None = None) -> dict[str, Any]:
    """One training in which a third replica joins, ended some steps later.

    Args:
        part_bytes: of weights that travel at a boundary; default as it is.
    """
    from lepton_ray.training.membership.coordinator import Coordinator

    context = multiprocessing.get_context("spawn")
    coordinator = Coordinator("127.0.0.1", SECRET, minimum=2, heartbeat_s=60.0)
    pipes, processes = [], []
    try:
        for number in range(3):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_replica, args=(number, coordinator.address, layers, part_bytes, theirs)
            )
            process.start()
            pipes.append(ours)
            processes.append(process)
        assert pipes[2].recv() == "ready"
        steps = [pipes[0].recv() for _ in range(BEFORE)]
        pipes[2].send("join")
        whole = 0
        while whole < AFTER:
            steps.append(pipes[0].recv())
            whole += steps[-1][:2] == (3, 3)
    finally:
        for process in processes:
            process.kill()
            process.join()
        coordinator.close()
    return {
        "usual_step_s": statistics.median(s for size, _, s, _ in steps[1:] if size == 2),
        "stood_s": max(between for *_, between in steps),
        "joining_steps": sum(size == 3 and hosts == 2 for size, hosts, *_ in steps),
    }


def main() -> None:
    options = _report.parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    detail: dict[str, Any] = {"cpus": os.cpu_count()}
    repeats = 1 if options.quick else 3
    for layers in (2, 80) if options.quick else (2, 8, 26, 80):
        megabytes = round(3 * 4 * layers * SIDE**2 / 1e6)
        runs: dict[str, list[dict[str, Any]]] = {"parts": [], "at_once": []}
        for _ in range(repeats):
            runs["parts"].append(join(layers))
            runs["at_once"].append(join(layers, 1 << 50))
        detail[f"{megabytes} MB"] = runs
        if not options.json:
            print(f"{megabytes} MB", json.dumps(runs), flush=True)
    largest = {arm: [run["stood_s"] for run in each] for arm, each in runs.items()}
    ours = runs["parts"]
    detail["join_at_once_over_parts"] = _report.ratio(largest["at_once"], largest["parts"])
    figures = {
        "join_at_once_over_parts": detail["join_at_once_over_parts"]["median"],
        "join_stood_s": statistics.median(largest["parts"]),
        "join_stood_steps": statistics.median(r["stood_s"] / r["usual_step_s"] for r in ours),
    }
    _report.finish(figures, detail)


if __name__ == "__main__":
    main()
