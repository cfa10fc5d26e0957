"""Train a finished run again and compare every link of its digest."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray

from lepton_ray import data
from lepton_ray.config import with_settings
from lepton_ray.errors import DivergenceError, InputError
from lepton_ray.jobs import session
from lepton_ray.jobs.runs import RunFolder
from lepton_ray.terminal import Terminal
from lepton_ray.training.determinism import differences
from lepton_ray.training.digest import first_broken_link, state_sha256
from lepton_ray.training.trainer import train


def verify(
    run: str, *, workers: int, epochs: int | None, address: str | None, terminal: Terminal
) -> dict[str, Any]:
    """Train a finished run again over another number of workers and compare every link.

    Args:
        run: the run's folder.
        epochs: compare the first ones only; None for all, and the weights too.

    Raises:
        DivergenceError: naming the first step that differs.
        InputError: when the run has no finished training, or the data have changed.
    """
    folder = RunFolder.open(run)
    done = folder.stage("train")
    if done is None:
        raise InputError(f"{run} has no finished training to verify")
    experiment = folder.experiment()
    if experiment.tune is not None and experiment.tune.searcher == "pbt" and folder.stage("tune"):
        raise InputError(
            f"{run} took its weights from a population, whose settings changed on the way: no one "
            "experiment gives them again"
        )
    tuned = folder.stage("tune")
    experiment = with_settings(
        experiment,
        {
            **(tuned["best"]["params"] if tuned else {}),
            "workers.min": workers,
            "workers.max": workers,
        },
    )
    dataset = data.load(experiment.data, model=experiment.model.name)
    if dataset.digest != folder.recall("data_digest"):
        raise InputError(f"the data of {run} have changed: their digest is {dataset.digest}")
    part = done["epochs"] if epochs is None else min(epochs, done["epochs"])
    terminal.say(f"verify {run}: {part} of {done['epochs']} epochs again on {workers} workers")
    with session.session(address, trains=True), tempfile.TemporaryDirectory() as scratch:
        session.check_room(experiment.workers, session.resources(), "the cluster")
        again = train(
            experiment,
            ray.put(dataset),
            folder=Path(scratch),
            checkpoints=f"{scratch}/checkpoints",
            epochs=part,
        )
    whole = part == done["epochs"]
    expected = [(step, link) for step, link in done["links"] if step <= again.steps]
    if not expected and not whole:
        raise InputError(
            f"{run} has no link of its digest in {part} epochs: raise --epochs (a link is made "
            f"every {experiment.train.digest_every} steps)"
        )
    broken = first_broken_link(expected, again.links)
    sha256 = state_sha256(again.weights)
    if broken is not None or (whole and sha256 != done["weights_sha256"]):
        where = f"first at step {broken}" if broken is not None else "in the final weights"
        profile = differences(again.profile, done["profile"])
        raise DivergenceError(
            f"{run} and its verification differ, {where}; "
            + (f"numerics: {'; '.join(profile)}" if profile else "their numerics are equal")
        )
    weights = f" and the weights {sha256[:12]}" if whole else ""
    terminal.say(f"equal  {len(expected)} links{weights}")
    return {
        "run": run,
        "workers": workers,
        "epochs": part,
        "links": len(expected),
        "weights_sha256": sha256 if whole else None,
    }
