"""One run of an experiment, stage by stage.

Each stage leaves its result in the run's folder, so that a killed run goes on with ``resume``.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from lepton_ray import models
from lepton_ray.config import flatten, render, with_settings
from lepton_ray.config import schema as config
from lepton_ray.data import decision
from lepton_ray.errors import CheckpointError, ExperimentError, GateError
from lepton_ray.jobs import provenance, session
from lepton_ray.jobs.metrics import RunMetrics
from lepton_ray.jobs.planning import make_plan
from lepton_ray.jobs.runs import RunFolder, local_root
from lepton_ray.jobs.watchers import TrainingWatcher, numbers, to_all
from lepton_ray.pipeline import carried, past
from lepton_ray.pipeline.checks import check_endpoint, score, score_labels, score_slices
from lepton_ray.pipeline.promotion import pass_gate, try_canary
from lepton_ray.pipeline.reports import (
    decision_table,
    label_table,
    same_weights,
    score_table,
    slice_table,
)
from lepton_ray.pipeline.version import write_version
from lepton_ray.serving import drift, package
from lepton_ray.serving.runtime import Runtime
from lepton_ray.serving.signature import signature
from lepton_ray.terminal import Silent, Terminal
from lepton_ray.tracking import registry
from lepton_ray.tracking.store import Tracker
from lepton_ray.training import baselines
from lepton_ray.training.checkpoint import CheckpointFolder, copy_last
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import TrainResult, train
from lepton_ray.tuning.population import last_epoch

CHECKED_ROWS = 32  # test samples sent to a new endpoint
STAGES = {
    "tune": ("tune",),
    "train": ("train", "register"),
    "run": ("tune", "train", "register", "gate", "serve"),
}


class Run:
    """One ``tune``, ``train`` or ``run`` of an experiment.

    Args:
        resume: go on with the last unfinished run of this command.
        keep: leave the endpoint up until Ctrl-C (on a named cluster: leave it and return).
        address: of a Ray cluster; default RAY_ADDRESS, else an embedded one.
        add_trials: go on with the last study of this command, with so many trials more.
        from_study: an earlier study to learn from: the folder of a run, the name of an experiment
            or a study's run in MLflow.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        command: str,
        *,
        resume: bool = False,
        keep: bool = False,
        address: str | None = None,
        terminal: Terminal | None = None,
        add_trials: int | None = None,
        from_study: str | None = None,
    ) -> None:
        self._experiment = experiment
        self._command = command
        self._resume = resume
        self._keep = keep
        self._address = address
        self._terminal: Terminal = terminal or Silent()
        self._add_trials = add_trials
        self._from_study = from_study
        self._started = time.monotonic()
        self._result: TrainResult | None = None

    def go(self) -> dict[str, Any]:
        """Run all stages of the command; what each gave, by name."""
        experiment, say = self._experiment, self._terminal.say
        stages = STAGES[self._command]
        if "tune" in stages and experiment.tune is None:
            if self._command == "tune":
                raise ExperimentError(experiment.name, ["tune: required to search, but missing"])
            stages = tuple(s for s in stages if s != "tune")
        if "serve" in stages:
            from lepton_ray.serving import endpoint  # and Ray Serve, which takes 2 s

            if session.is_embedded(self._address):
                endpoint.check_port(experiment.serve.host, experiment.serve.port)
        if self._resume:
            self._folder = RunFolder.find_unfinished(experiment, self._command)
        elif self._add_trials:
            from lepton_ray.pipeline import search

            self._folder = search.extend(experiment, self._command, self._add_trials)
        if self._from_study:
            past.find(self._from_study, experiment)  # before anything is started
        with session.session(self._address):
            if "serve" in stages:
                session.check_gpus(experiment.serve, session.possible(session.resources()))
                endpoint.check_free(f"{experiment.name}@champion", share=True)
            planned = experiment
            if "tune" not in stages:
                planned = experiment.model_copy(update={"tune": None})
            plan, self._dataset = make_plan(planned, address=self._address, terminal=self._terminal)
            say(plan.table())
            self._tracker = Tracker(experiment.name, local_root(experiment.storage) / "artifacts")
            if not self._resume and not self._add_trials:
                self._folder = RunFolder.create(experiment, self._command)
            say(f"run    {self._folder.uri}")
            self._folder.is_of_data(self._dataset.digest)
            self._reference = ray.put(self._dataset)
            results: dict[str, Any] = {"run": self._folder.uri}
            try:
                for name in stages:
                    done = self._folder.stage(name) if name != "serve" else None
                    if done is None:
                        done = getattr(self, f"_{name}")(results)
                        self._folder.finish_stage(name, done)
                    else:
                        say(f"{name:6} done before")
                    results[name] = done
            except BaseException as error:
                ended = isinstance(error, GateError)
                self._folder.end("finished" if ended else "failed")
                raise
            self._folder.end("finished")
        results["seconds"] = round(time.monotonic() - self._started, 1)
        return results

    def _tune(self, results: dict[str, Any]) -> dict[str, Any]:
        from lepton_ray.pipeline import search  # and Ray Tune, which takes 1 s

        return search.search(
            self._experiment,
            self._reference,
            folder=self._folder,
            tracker=self._tracker,
            terminal=self._terminal,
            tags=self._common_tags(),
            from_study=self._from_study,
        )

    def _train(self, results: dict[str, Any]) -> dict[str, Any]:
        experiment = self._tuned(results)
        tags = self._common_tags() | {"lepton_ray.kind": "training"}
        if "tune" in results:
            tags["lepton_ray.study"] = results["tune"]["study"]
        run_id = self._folder.recall("training_run")
        if run_id is None:
            run_id = self._tracker.start(
                f"train {self._folder.id}",
                params=flatten(experiment.model_dump(mode="json", exclude={"tune"})),
                tags=tags,
            )
            self._folder.remember("training_run", run_id)
            self._tracker.text(run_id, "experiment.yaml", render(experiment))
        else:
            self._tracker.reopen(run_id)
        epochs = None
        if "tune" in results and self._is_population:
            # Its settings changed on the way: the best member's training is the final one, to where
            # it was the best.
            source = CheckpointFolder(results["tune"]["checkpoint"])
            copy_last(source, CheckpointFolder(self._folder.checkpoints))
            assert experiment.tune is not None
            number = results["tune"]["best"]["number"]
            epochs = last_epoch(experiment.tune, number, experiment.train.epochs)
        start = time.monotonic()
        watcher = TrainingWatcher(
            run_id,
            self._tracker,
            self._terminal,
            experiment,
            self._folder.path,
            recorded=self._tracker.recorded(run_id),
        )
        shown = RunMetrics(experiment.name, self._folder.id)
        try:
            with contextlib.closing(watcher):
                result = train(
                    experiment,
                    self._reference,
                    folder=self._folder.path,
                    checkpoints=self._folder.checkpoints,
                    epochs=epochs,
                    on_event=to_all(watcher, shown),
                )
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt)
            self._tracker.finish(run_id, "KILLED" if killed else "FAILED")
            raise
        self._result = result
        sha256 = state_sha256(result.weights)
        self._tracker.tags(
            run_id,
            {
                "lepton_ray.weights_sha256": sha256,
                "lepton_ray.digest": result.digest,
                "lepton_ray.exact": str(experiment.train.exact).lower(),
                **{f"lepton_ray.numerics.{k}": str(v) for k, v in result.profile.items()},
            },
        )
        same = ""
        if "tune" in results:
            same = same_weights(results["tune"]["best"], sha256)
            if self._is_population:
                for epoch, metrics in enumerate(result.history, 1):
                    self._tracker.metrics(run_id, metrics, epoch)
        self._tracker.flush()
        last = result.history[-1]
        self._terminal.say(
            f"train  {len(result.history)} epochs, {result.steps} steps in "
            f"{time.monotonic() - start:.0f} s: {numbers(last)}; weights {sha256[:12]}{same}"
        )
        return {
            "run_id": run_id,
            "weights_sha256": sha256,
            "digest": result.digest,
            "links": result.links,
            "epochs": len(result.history),
            "steps": result.steps,
            "metrics": last,
            "profile": result.profile,
        }

    def _register(self, results: dict[str, Any]) -> dict[str, Any]:
        experiment, dataset = self._tuned(results), self._dataset
        run_id = results["train"]["run_id"]
        folder = self._folder.path / "version"
        model = models.build(
            experiment.model,
            dataset.preprocess.input_shape,
            dataset.schema.outputs,
            dataset.facts,
        )
        expected = results["train"]["weights_sha256"]
        model.load_state_dict(self._weights(experiment, expected))
        origin = {
            "git_commit": provenance.git_commit(),
            "data_digest": dataset.digest,
            **self._pretrained(),
            "mlflow_run": run_id,
            "training_digest": results["train"]["digest"],
            "software": provenance.software(),
            **drift.to_json(dataset.bins),
        }
        beside = write_version(folder, model, experiment, dataset, origin)
        if carried.IMPORTANCE in beside:
            self._tracker.text(run_id, carried.IMPORTANCE, beside[carried.IMPORTANCE].decode())
        runtime = Runtime.load(folder)
        test = {
            "model": score(runtime, dataset),
            **baselines.measure(dataset, experiment.train.seed),
        }
        for name, metrics in test.items():
            prefix = "test" if name == "model" else name
            self._tracker.metrics(
                run_id, {f"{prefix}_{m}": v for m, v in metrics.items()}, results["train"]["epochs"]
            )
        sliced, labels = score_slices(runtime, dataset), score_labels(runtime, dataset)
        self._tracker.metrics(
            run_id,
            {
                re.sub(r"[^\w\-./: ]", "_", f"test_{metric}/{column}/{group}"): value
                for column, groups in [*sliced.items(), ("label", labels)]
                for group, metrics in groups.items()
                for metric, value in metrics.items()
            },
            results["train"]["epochs"],
        )
        version = registry.register(
            experiment.name,
            run_id=run_id,
            folder=folder,
            python_model=Path(package.__file__).with_name("pyfunc_model.py"),
            signature=signature(dataset.schema),
            tags={
                "lepton_ray.weights_sha256": results["train"]["weights_sha256"],
                **{f"test_{m}": f"{v:.6f}" for m, v in test["model"].items()},
            },
        )
        self._tracker.finish(run_id)
        self._terminal.say(score_table(experiment, version.version, test, len(dataset.test)))
        if runtime.decision != decision.plain(dataset.schema):
            self._terminal.say(decision_table(dataset.schema, runtime.decision))
        if labels:
            self._terminal.say(label_table(labels))
        for column, groups in sliced.items():
            self._terminal.say(slice_table(column, groups))
        return {
            "name": version.name,
            "version": version.version,
            "test": test,
            "labels": labels,
            "slices": sliced,
            "decision": asdict(runtime.decision),
        }

    def _gate(self, results: dict[str, Any]) -> dict[str, Any]:
        registered = results["register"]
        version = registry.resolve(f"{registered['name']}/{registered['version']}")
        measured = (self._experiment, version, registered["test"], self._dataset)
        champion = registry.find_champion(version.name)
        tried = self._experiment.serve.canary is not None
        if tried and champion is not None and champion.version != version.version:
            return try_canary(*measured, None, self._terminal)
        return pass_gate(*measured, self._terminal)

    def _serve(self, results: dict[str, Any]) -> dict[str, Any]:
        from lepton_ray.serving import endpoint

        name = results["register"]["name"]
        reference = f"{name}@champion"
        start = time.monotonic()
        with endpoint.serving(reference, self._experiment.serve, share=True) as live:
            self._terminal.say(
                f"serve  {reference} on {live.url} after {time.monotonic() - start:.0f} s; "
                f"docs at {live.url}/docs"
            )
            rows = package.rows(self._dataset.schema, self._dataset.test_columns, CHECKED_ROWS)
            with live.client() as client:
                checked = check_endpoint(client, name, rows)
            self._terminal.say(
                f"query  {checked} test samples over HTTP equal load_model({reference!r}).predict\n"
                f"       {endpoint.curl(live, min(rows, key=lambda row: len(str(row))))}"
            )
            if self._keep:
                live.keep(self._terminal.say)
        return {"url": live.url, "checked": checked}

    def _tuned(self, results: Mapping[str, Any]) -> config.Experiment:
        """The experiment with the best trial's settings, where there was a study."""
        if "tune" not in results:
            return self._experiment
        return with_settings(self._experiment, results["tune"]["best"]["params"])

    @property
    def _is_population(self) -> bool:
        tune = self._experiment.tune
        return tune is not None and tune.searcher == "pbt"

    def _weights(self, experiment: config.Experiment, expected: str) -> dict[str, Tensor]:
        """What training gave; after a resume, from its last checkpoint."""
        if self._result is not None:
            return self._result.weights
        replica = Replica(
            experiment,
            self._dataset,
            checkpoints=CheckpointFolder(self._folder.checkpoints),
        )
        weights = replica.state.final_weights()
        if state_sha256(weights) != expected:
            raise CheckpointError(
                f"the last checkpoint in {self._folder.uri} is not the end of its training: "
                "start anew without --resume"
            )
        return weights

    def _common_tags(self) -> dict[str, str]:
        return {
            "lepton_ray.run": self._folder.id,
            "lepton_ray.data_digest": self._dataset.digest,
            **{f"lepton_ray.{name}": value for name, value in self._pretrained().items()},
            "mlflow.source.git.commit": provenance.git_commit(),
        }

    def _pretrained(self) -> dict[str, str]:
        """What the model starts from, where that was trained before."""
        given = self._dataset.pretrained
        return (
            {} if given is None else {"pretrained": given.name, "pretrained_sha256": given.sha256}
        )
