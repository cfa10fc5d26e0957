"""How long the others stand still when replicas of a running job die, hang and come back.

    python benchmarks/recovery.py [--case EVENT] [--summary] [--quick] [--json]

Arms: ours (live replicas on Ray), torchft (see peers/torchft_ddp.py), and torchrun's elastic agent.
Three replicas on one machine train a linear layer, 50 ms a step; every dead one is started again by
what starts it in production (Ray, torchrun's agent, a loop for torchft). Events: ``live``, kill -9
of the last replica; ``first``, of rank 0; ``two``, of two at once; ``silent``, SIGSTOP of the last
one, which closes no socket, and SIGCONT when the others have gone on.

A step is done when somebody starts the next. ``recover_s`` is how much longer than usual the step
took that the event hit, until then; ``join_s`` the same of the longest step while the lost replicas
come back; ``redone`` how many done steps were done again. torchrun waits for a silent worker for
half an hour, so that pair is not run.

``recovery_vs_ray_default`` and ``recovery_vs_ray_tuned`` are from the runs that
benchmarks/resize.py keeps; there are the loss of a node, a drain and a join (``add``) too.
``live_recovery_s`` is of events in which processes die, ``live_silent_recovery_s`` of the other.

Each run has every event once and is appended to ``results/recovery.jsonl``; what is there is not
done again. ``--quick`` runs each arm once and keeps nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import _report
import resize

HERE = Path(__file__).parent
KEPT = HERE / "results" / "recovery.jsonl"
PEERS = HERE / "peers"
EVENTS = ("live", "first", "two", "silent")
REPEATS = {"ours": 10, "torchft": 10, "torchrun": 3}
REPLICAS = 3
STEP_S = 0.05
SAVE_EVERY = 20
CALM_S = 3.0  # of steps of all replicas between two events
LIMIT_S = 60.0  # for one event
STEPS = 6000  # of ours: more than all events take


class Line(NamedTuple):
    """A step that a replica starts to try."""

    at: float
    step: int
    pid: int
    rank: int
    size: int


def lines_of(log: Path) -> list[Line]:
    if not log.exists():
        return []
    whole = [text.split() for text in log.read_text().split("\n")[:-1]]
    return sorted(Line(float(a), int(b), int(c), int(d), int(e)) for a, b, c, d, e in whole)


def first_tries(lines: list[Line]) -> list[Line]:
    """Of each step number the first time that anybody started it."""
    furthest, first = -1, []
    for line in lines:
        if line.step > furthest:
            furthest = line.step
            first.append(line)
    return first


def figures(lines: list[Line], event_s: float, whole_s: float) -> dict[str, float]:
    """Of one event, at ``event_s``, after which all replicas were there again at ``whole_s``."""
    first = first_tries(lines)
    took = [(b.at - a.at, a.at, b.at) for a, b in itertools.pairwise(first)]
    usual = statistics.median(t for t, a, b in took if event_s - CALM_S < b < event_s)
    hit = next(i for i, (_, _, b) in enumerate(took) if b > event_s)
    # A replica can die after its part of a step: the next step is hit then.
    recovered = max((hit, hit + 1), key=lambda i: took[i][0])
    later = [t for t, a, b in took[recovered + 1 :] if a < whole_s + 1]
    done = max(line.step for line in first if line.at <= took[recovered][1])
    after = [line.step for line in lines if line.at > event_s]
    return {
        "recover_s": took[recovered][0] - usual,
        "join_s": max(later) - usual if later else 0.0,
        "whole_after_s": whole_s - event_s,
        "redone": float(max(0, done - min(after))),
        "usual_s": usual,
    }


def run_events(log: Path, events: list[str]) -> Iterator[dict[str, Any]]:
    """Wait until all train, do the next event, wait until all train again."""
    whole_since(log, 0.0, set())
    for event in events:
        now = [line for line in lines_of(log)[-40:] if line.size == REPLICAS]
        by_rank = {line.rank: line.pid for line in now}
        victims = {"first": [0], "two": [REPLICAS - 2, REPLICAS - 1]}.get(event, [REPLICAS - 1])
        pids = {by_rank[rank] for rank in victims}
        at = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP if event == "silent" else signal.SIGKILL)
        if event == "silent":
            wait_for(lambda at=at: len(since(log, at)) > 20)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        whole = whole_since(log, at, set() if event == "silent" else pids)
        yield {"event": event, **figures(lines_of(log), at, whole)}


def since(log: Path, at: float) -> list[Line]:
    """New steps begun after ``at``."""
    return [line for line in first_tries(lines_of(log)) if line.at > at]


def whole_since(log: Path, at: float, gone: set[int]) -> float:
    """When all replicas trained again after ``at``; returns when they have for `CALM_S`.

    Args:
        gone: processes that cannot be among them.
    """
    found = 0.0

    def whole() -> bool:
        nonlocal found
        after = [x for x in lines_of(log) if x.at > at and x.pid not in gone]
        small = max((x.at for x in after if x.size < REPLICAS), default=at)
        there = {x.pid for x in after if x.at > after[-1].at - 1}
        # Not of those that tried the step of the event and were replaced since.
        full = [x for x in after if x.at > small and x.size == REPLICAS and x.pid in there]
        found = min((x.at for x in full), default=0.0)
        return len(there) == REPLICAS and bool(full) and full[-1].at - found > CALM_S

    wait_for(whole)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """
    Raises:
        TimeoutError: when it does not hold within `LIMIT_S`.
    """
    deadline = time.time() + LIMIT_S
    while not condition():
        if time.time() > deadline:
            raise TimeoutError(f"nothing within {LIMIT_S:g} s")
        time.sleep(0.2)


# --- the arms ------------------------------------------------------------------------------------


@contextmanager
def ours(log: Path) -> Iterator[None]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment["PYTHONPATH"] = str(HERE)
    errors = log.with_suffix(".errors").open("w")
    command = [sys.executable, __file__, "--train", str(log)]
    process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
    try:
        yield
    finally:
        Path(f"{log}.stop").touch()
        process.wait(LIMIT_S)


def train(log: Path) -> None:
    """Ours, in a process of its own."""
    import ray
    from resize import train_ours

    ray.init(num_cpus=REPLICAS, log_to_driver=False, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        train_ours(str(log), STEPS, Path(folder), workers=REPLICAS, step_s=STEP_S)
    ray.shutdown()


def peer_python() -> Path:
    """The peers' own environment, made when it is missing."""
    folder = PEERS / ".venvs" / "torchft"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        wanted = str(PEERS / "torchft.txt")
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
    return python


@contextmanager
def torchft(log: Path) -> Iterator[None]:
    """A lighthouse, and three processes that are started again when they die."""
    python = peer_python()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
    errors = log.with_suffix(".errors").open("w")
    lighthouse = subprocess.Popen(
        [python, "-c",
         "import sys; from torchft.coordination import LighthouseServer; "
         "it = LighthouseServer(bind='127.0.0.1:0', min_replicas=1, join_timeout_ms=100, "
         "quorum_tick_ms=20, heartbeat_timeout_ms=1000); print(it.address(), flush=True); "
         "sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
    )  # fmt: skip
    assert lighthouse.stdin
    assert lighthouse.stdout
    environment["TORCHFT_LIGHTHOUSE"] = lighthouse.stdout.readline().strip()
    command = [python, str(PEERS / "torchft_ddp.py"), str(log), str(STEP_S)]
    over = threading.Event()

    def keep_one() -> None:
        while not over.is_set():
            process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
            while process.poll() is None and not over.wait(0.05):
                pass
            if over.is_set():
                process.kill()
                process.wait()

    keepers = [threading.Thread(target=keep_one) for _ in range(REPLICAS)]
    for keeper in keepers:
        keeper.start()
    try:
        yield
    finally:
        over.set()
        for keeper in keepers:
            keeper.join()
        lighthouse.stdin.close()
        lighthouse.wait(10)


@contextmanager
def torchrun(log: Path) -> Iterator[None]:
    python = peer_python()
    errors = log.with_suffix(".errors").open("w")
    # By default attempts share a store, in which new workers find the addresses of dead ones.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **fresh}
    process = subprocess.Popen(
        [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={REPLICAS}",
         "--max-restarts=100", str(PEERS / "torchrun_ddp.py"), str(log), str(STEP_S),
         str(SAVE_EVERY)],
        env=environment, stdout=errors, stderr=errors,
    )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()  # and its workers with it
        process.wait(LIMIT_S)


ARMS = {"ours": ours, "torchft": torchft, "torchrun": torchrun}


def measure(arm: str, events: list[str]) -> list[dict[str, Any]]:
    """One training, the events one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps"
        with ARMS[arm](log):
            try:
                return [{"arm": arm, **one} for one in run_events(log, events)]
            except TimeoutError as error:
                said = log.with_suffix(".errors").read_text()[-4000:]
                last = "\n".join(map(str, lines_of(log)[-6:]))
                raise RuntimeError(f"{arm}: {error}\n{last}\n{said}") from error


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]))
        return
    parser = _report.parser(__doc__)
    parser.add_argument("--case", choices=EVENTS, help="only this event")
    parser.add_argument("--summary", action="store_true", help="only of the runs that are kept")
    options = parser.parse_args()
    events = [options.case] if options.case else list(EVENTS)
    runs = [] if options.quick or not KEPT.exists() else _kept()
    for repeat, arm in itertools.product(range(0 if options.summary else 10), ARMS):
        todo = [
            event
            for event in events
            if (arm, event) != ("torchrun", "silent")
            and len(_of(runs, arm, event)) <= repeat < (1 if options.quick else REPEATS[arm])
        ]
        if not todo:
            continue
        found = measure(arm, todo)
        runs += found
        for run in found:
            if not options.quick:
                with KEPT.open("a") as file:
                    file.write(json.dumps(run) + "\n")
            if not options.json:
                print(json.dumps(run), flush=True)
    detail: dict[str, Any] = {}
    for event in events:
        recover = {arm: [r["recover_s"] for r in _of(runs, arm, event)] for arm in ARMS}
        detail[event] = {"runs": {arm: _of(runs, arm, event) for arm in ARMS}}
        for peer in ("torchft", "torchrun"):
            pairs = list(zip(recover[peer], recover["ours"], strict=False))
            if pairs:
                theirs, own = zip(*pairs, strict=True)
                detail[event][f"{peer}_over_ours"] = _report.ratio(theirs, own)
    median_s = {
        event: statistics.median(r["recover_s"] for r in d["runs"]["ours"])
        for event, d in detail.items()
    }
    by_ray = resize.summary(resize.kept(), [e for e in resize.EVENTS if e != "add"])
    measured, detail = detail, {**detail, "ray": by_ray}
    _report.finish(
        {
            **{
                name: max(median_s[event] for event in of)
                for name, of in (
                    ("live_recovery_s", set(events) - {"silent"}),
                    ("live_silent_recovery_s", set(events) & {"silent"}),
                )
                if of
            },
            **{
                f"recovery_vs_ray_{how}": min(
                    d[f"{how}_over_ours"]["median"] for d in by_ray.values()
                )
                for how in ("default", "tuned")
            },
            **{
                f"recovery_vs_{peer}": min(ratios)
                for peer in ("torchft", "torchrun")
                if (
                    ratios := [
                        d[f"{peer}_over_ours"]["median"]
                        for d in measured.values()
                        if f"{peer}_over_ours" in d
                    ]
                )
            },
        },
        detail,
    )


def _kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()]


def _of(runs: list[dict[str, Any]], arm: str, event: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["arm"], run["event"]) == (arm, event)]


if __name__ == "__main__":
    main()
