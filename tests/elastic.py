"""Train over plain gloo processes that are killed at chosen moments.

The processes run the very loop that Ray Train's workers run. A generation is a group of some size
that goes on from the last checkpoint; one of its processes may kill itself with SIGKILL in the
middle of a step. What remains of the group fails with it, as Ray Train's would, and the next
generation takes over (`train`); or, with live replicas, goes on without it (`train_live`).
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lepton_ray.config.schema import Experiment

MODELS = {
    "mlp": {"name": "mlp", "width": 24, "dropout": 0.1},
    "cnn": {"name": "cnn", "width": 4, "dropout": 0.1},
    "transformer": {"name": "tests.nets:transformer"},
}
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adamw": {"name": "adamw", "lr": 0.003},
}
PHASES = ("fetch", "forward", "start", "gather", "finish", "apply", "optimizer", "checkpoint")
TIMEOUT_S = 120

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["lepton_ray.training.loop", "lepton_ray.training.membership.live", "sklearn.datasets"]
)


@dataclasses.dataclass(frozen=True)
class Kill:
    rank: int
    step: int
    phase: str


@dataclasses.dataclass(frozen=True)
class Generation:
    size: int
    kill: Kill | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    sha256: str
    digest: str
    history: list[dict[str, float]]
    restored: list[int]
    """The step each generation started from."""


def train(
    experiment: Experiment,
    generations: list[Generation],
    folder: Path | None = None,
    fault: str = "",
    prepare: Callable[[Any], Any] | None = None,
) -> Outcome:
    """Run the generations one after the other; the last one must finish.

    Args:
        fault: a fault planted in every process, for negative controls: see `_plant_fault`.
        prepare: makes of the experiment's dataset what every process trains on.
    """
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints = str(folder or Path(temporary) / "checkpoints")
        restored = []
        for generation in generations:
            results = _run(experiment, generation, checkpoints, fault, prepare)
            restored += [r["restored"] for r in results if r and "restored" in r][:1]
        finished = [r for r in results if r and "sha256" in r]
        assert len(finished) == generations[-1].size, f"the last generation failed: {results}"
        assert len({(r["sha256"], r["digest"]) for r in finished}) == 1, "replicas differ"
        first = finished[0]
        return Outcome(first["sha256"], first["digest"], first["history"], restored)


def _run(
    experiment: Experiment,
    generation: Generation,
    checkpoints: str,
    fault: str,
    prepare: Callable[[Any], Any] | None,
) -> list[dict[str, Any] | None]:
    with tempfile.NamedTemporaryFile() as rendezvous:
        store = f"{rendezvous.name}.store"
        processes, pipes = [], []
        for rank in range(generation.size):
            receive, send = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_replica,
                args=(experiment, generation, rank, checkpoints, store, fault, prepare, send),
            )
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        results = []
        for process, pipe in zip(processes, pipes, strict=True):
            process.join(TIMEOUT_S)
            assert not process.is_alive(), "a process hangs"
            result: dict[str, Any] | None = None
            while pipe.poll():
                try:
                    result = {**(result or {}), **pipe.recv()}
                except EOFError:
                    break
            results.append(result)
        if generation.kill is not None:
            killed = processes[generation.kill.rank]
            assert killed.exitcode == -signal.SIGKILL, f"not killed: {generation}, {results}"
        Path(store).unlink(missing_ok=True)
        return results


def _replica(
    experiment: Experiment,
    generation: Generation,
    rank: int,
    checkpoints: str,
    store: str,
    fault: str,
    prepare: Callable[[Any], Any] | None,
    pipe: Connection,
) -> None:
    import torch.distributed as dist

    from lepton_ray import data
    from lepton_ray.training.checkpoint import CheckpointFolder
    from lepton_ray.training.digest import state_sha256
    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership import Fixed

    _plant_fault(fault, rank)
    group = None
    if generation.size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=generation.size
        )
        group = dist.group.WORLD
    dataset = data.load(experiment.data, model=experiment.model.name)
    if prepare is not None:
        dataset = prepare(dataset)
    replica = Replica(
        experiment, dataset, membership=Fixed(group), checkpoints=CheckpointFolder(checkpoints)
    )
    pipe.send({"restored": replica.state.step})
    if generation.kill is not None and generation.kill.rank == rank:
        _plant_kill(replica, generation.kill)
    try:
        for _ in replica.epochs():
            pass
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    pipe.send(
        {
            "sha256": state_sha256(replica.state.final_weights()),
            "digest": replica.state.digest,
            "history": replica.state.history,
        }
    )


def _plant_kill(replica: Any, kill: Kill) -> None:
    """Make this process kill itself in one phase of one step."""
    from lepton_ray import storage
    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership import delivery
    from lepton_ray.training.reduction import Reduction
    from lepton_ray.training.step import TrainStep

    owners = {
        "enter": (Replica, "_take_part"),
        "heal": (delivery, "deliver"),
        "measure": (Replica, "measure"),
        "fetch": (replica._step, "_fetch"),
        "forward": (TrainStep, "_tail"),
        "start": (Reduction, "start"),  # while the backward runs
        "gather": (Reduction, "gather"),
        "finish": (Reduction, "finish"),
        "apply": (TrainStep, "_apply"),
        "optimizer": (replica.state.optimizer, "step"),
        "checkpoint": (storage, "writing"),
    }
    owner, name = owners[kill.phase]
    original = getattr(owner, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if replica.state.step >= kill.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def _plant_fault(fault: str, rank: int) -> None:
    """Faults that must change the bytes, or the equality would say nothing."""
    import numpy as np
    import torch

    from lepton_ray.training import batches, determinism, step

    if fault == "threads":
        configure = determinism.configure

        def two_threads(*args: Any, **kwargs: Any) -> Any:
            profile = configure(*args, **kwargs)
            torch.set_num_threads(2)
            return profile

        determinism.configure = two_threads
    elif fault == "swapped_sample":
        original = batches.shard_indices

        def swapped(**kwargs: Any) -> Any:
            rows = np.array(original(**kwargs))
            if kwargs["step"] == 0 and kwargs["epoch"] == 0 and kwargs["shard"] == 0:
                rows[0] = (rows[0] + 1) % kwargs["samples"]
            return rows

        batches.shard_indices = swapped
    elif fault == "silent_corruption" and rank == 1:
        apply = step.TrainStep._apply

        def corrupted(self: Any, *args: Any) -> None:
            apply(self, *args)
            if self._state.step == 3:
                with torch.no_grad():
                    next(iter(self._state.model.parameters())).view(-1)[0] += 1e-3

        step.TrainStep._apply = corrupted
    elif fault == "ddp":
        step.TrainStep.run = _data_parallel_step
    else:
        assert fault in ("", "silent_corruption"), fault


def _data_parallel_step(self: Any, wish: bool) -> None:
    """What DistributedDataParallel does: one batch a replica, gradients averaged over replicas."""
    import torch
    import torch.distributed as dist

    state = self._state
    parts = [self._fetch(state.step, shard) for shard in self._hosted]
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    state.optimizer.zero_grad()
    loss = self._loss(state.model(x), y)
    loss.backward()
    state.loss = loss.detach().reshape(1)
    if dist.is_initialized():
        for tensor in [*(p.grad for p in self._parameters), state.loss]:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
    state.optimizer.step()
    state.step += 1


@dataclasses.dataclass(frozen=True)
class Member:
    """One live replica: there from the start, or from when training has come to a step."""

    joins_at: int = 0
    kill: Kill | None = None
    """Its rank is not looked at."""
    leaves_at: int | None = None
    stopped_at: int | None = None
    """SIGSTOP, and SIGCONT when the others have gone on without it, or it was dropped."""
    slow: bool = False
    """Its work on a shard takes long."""
    corrupt: bool = False
    """Its memory changes once, in silence: see `_plant_fault`."""

    @property
    def stays(self) -> bool:
        """There from the start to the end."""
        goes = self.kill is not None or self.leaves_at is not None or self.corrupt
        return not self.joins_at and not goes


@dataclasses.dataclass(frozen=True)
class LiveOutcome:
    sha256: str
    digest: str
    history: list[dict[str, float]]
    events: list[dict[str, Any]]
    """What replica 0, whichever it was, and the coordinator told, in order."""


def train_live(
    experiment: Experiment,
    members: list[Member],
    pause_s: float = 0.02,
    part_bytes: int | None = None,
) -> LiveOutcome:
    """Train with live replicas that come and go as written; those that are left must agree.

    Args:
        pause_s: in every step, so that the members' comings and goings fall into the training.
        part_bytes: what travels to a joiner at each step boundary; 1 for one tensor, None for as
            much as usual.
    """
    from lepton_ray.training.checkpoint import CheckpointFolder
    from lepton_ray.training.membership.coordinator import Coordinator

    events: list[dict[str, Any]] = []
    secret = b"of this run"
    coordinator = Coordinator(
        "127.0.0.1",
        secret,
        minimum=sum(m.stays for m in members),
        heartbeat_s=1.0,
        straggler_s=1.0,
        tell=events.append,
    )
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for number, member in enumerate(members):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_live_replica,
                args=(
                    experiment,
                    number,
                    member,
                    coordinator.address,
                    secret,
                    folder,
                    pause_s,
                    part_bytes,
                    theirs,
                ),
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            results = _follow(members, processes, pipes, events)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join(TIMEOUT_S)
            coordinator.close()
        last = CheckpointFolder(folder).load_last()
    expected = {n for n, m in enumerate(members) if m.stays}
    assert set(results) >= expected, (expected, results, events)
    assert len({(r["sha256"], r["digest"]) for r in results.values()}) == 1, "replicas differ"
    first = next(iter(results.values()))
    assert last is not None
    assert last[1]["history"] == first["history"], "the end is not saved"
    return LiveOutcome(first["sha256"], first["digest"], first["history"], events)


def _follow(
    members: list[Member], processes: list[Any], pipes: list[Connection], events: list[dict]
) -> dict[int, dict[str, Any]]:
    """Give each member its cue when training has come to its step; their results by number."""
    results: dict[int, dict[str, Any]] = {}
    stopped: dict[int, int] = {}
    step, ready, waiting = 0, 0, set(range(len(members)))
    to_stop = {n for n, m in enumerate(members) if m.stopped_at is not None}
    open_pipes = dict(enumerate(pipes))
    deadline = time.monotonic() + TIMEOUT_S
    while open_pipes:
        assert time.monotonic() < deadline, (step, results, events)
        for pipe in wait(list(open_pipes.values()), 0.5):
            number = next(n for n, p in open_pipes.items() if p is pipe)
            try:
                message = pipe.recv()
            except EOFError:
                del open_pipes[number]
                continue
            if "ready" in message:
                ready += 1
            elif "event" in message:
                events.append({**message["event"], "number": number})
                step = message["event"].get("step", step)
            else:
                assert "error" not in message, message["error"]
                results[number] = message
        if ready < len(members):
            continue
        for number in [n for n in waiting if step >= members[n].joins_at or results]:
            waiting.remove(number)
            open_pipes[number].send("join")
        for number in [n for n in to_stop if step >= (members[n].stopped_at or 0)]:
            to_stop.remove(number)
            stopped[number] = step
            os.kill(processes[number].pid, signal.SIGSTOP)
        dropped = any("silent" in event.get("reason", "") for event in events)
        for number in [n for n, at in stopped.items() if step > at + 2 or dropped or results]:
            del stopped[number]
            os.kill(processes[number].pid, signal.SIGCONT)
    return results


def _live_replica(
    experiment: Experiment,
    number: int,
    member: Member,
    address: tuple[str, int, int],
    secret: bytes,
    folder: str,
    pause_s: float,
    part_bytes: int | None,
    pipe: Connection,
) -> None:
    from lepton_ray import data
    from lepton_ray.training import joining
    from lepton_ray.training.checkpoint import CheckpointFolder
    from lepton_ray.training.digest import state_sha256
    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership import DoubtError, LeftError, OutvotedError
    from lepton_ray.training.membership.live import Live
    from lepton_ray.training.step import TrainStep

    joining.PART_BYTES = part_bytes or joining.PART_BYTES
    leave = threading.Event()
    if member.corrupt:
        _plant_fault("silent_corruption", 1)
    dataset = data.load(experiment.data, model=experiment.model.name)
    run = TrainStep.run
    waits = True

    def slow(self: Any, *, wish: bool) -> None:
        time.sleep(pause_s)
        run(self, wish=wish)
        pipe.send({"event": {"kind": "step", "step": self._state.step, "hosted": self.hosted}})
        if member.leaves_at is not None and self._state.step >= member.leaves_at:
            leave.set()

    TrainStep.run = slow
    if member.slow:
        loss_of = TrainStep._loss_of

        def slower(*args: Any) -> Any:
            time.sleep(0.1)
            return loss_of(*args)

        TrainStep._loss_of = slower
    enter = Replica._join

    def enter_and_plant(self: Any, **kwargs: Any) -> bool:
        nonlocal waits
        if waits:
            waits = False
            if member.kill is not None:
                _plant_kill(self, member.kill)
            pipe.send({"ready": number})
            pipe.recv()
        return enter(self, **kwargs)

    Replica._join = enter_and_plant

    memberships: list[Live] = []

    def live(name: str) -> Replica:
        membership = Live(
            address,
            secret,
            id=name,
            guaranteed=member.stays,
            host="127.0.0.1",
            should_leave=leave.is_set,
        )
        memberships.append(membership)
        replica = Replica(
            experiment,
            dataset,
            membership=membership,
            checkpoints=CheckpointFolder(folder),
            report=lambda event: pipe.send({"event": event}),
        )
        for _ in replica.epochs():
            pass
        return replica

    try:
        try:
            replica = live(f"replica {number}")
        except DoubtError:
            memberships[0]._say({"kind": "bye"})  # as the end of its process would
            replica = live(f"replica {number} again")
    except OutvotedError as error:
        pipe.send({"event": {"kind": "outvoted", "reason": str(error)}})
        os._exit(0)
    except LeftError:
        os._exit(0)
    except Exception:
        pipe.send({"error": traceback.format_exc()})
        os._exit(1)
    pipe.send(
        {
            "sha256": state_sha256(replica.state.final_weights()),
            "digest": replica.state.digest,
            "history": replica.state.history,
        }
    )
    pipe.close()
    os._exit(0)
