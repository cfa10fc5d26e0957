"""Commands on an experiment file, and on its runs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lepton_ray.cli.commands import Commands, add_address, count
from lepton_ray.cli.terminal import Terminal
from lepton_ray.errors import InputError


def declare(commands: Commands) -> None:
    """Add init, plan, run, tune, train, render, schema and verify."""
    init = commands.add("init", _init, "write an experiment for data, guesses explained")
    init.add_argument("data", metavar="DATA", help="images in class folders; CSV, Parquet, JSONL")
    init.add_argument("-o", "--output", metavar="FILE", help="default: NAME.yaml, after the data")
    init.add_argument(
        "--target",
        metavar="NAME",
        help="the column to predict, or columns of labels: a,b; default a guess",
    )
    init.add_argument("--force", action="store_true", help="overwrite the file")
    plan = commands.add_on_file("plan", _plan, "check all, run one real step; change nothing")
    add_address(plan)
    plan.add_argument(
        "--cluster", metavar="YAML", help="does it fit this cluster file; what it costs"
    )
    plan.add_argument("--prices", metavar="FILE", help="own prices of machines, over the table's")
    verbs = {
        "run": "plan, tune, train, register, gate, promote and serve",
        "tune": "search the space of the experiment",
        "train": "train, evaluate and register a version, without a search",
    }
    for name, text in verbs.items():
        command = commands.add_on_file(name, _run, text)
        command.add_argument("--resume", action="store_true", help="go on with the last run")
        add_address(command)
        if name == "tune":
            command.add_argument(
                "--add-trials", type=count, metavar="N", help="extend the last finished study"
            )
        if name != "train":
            command.add_argument(
                "--from-study",
                metavar="NAME",
                help="learn from an earlier one: a run's folder, an experiment, an MLflow run",
            )
        if name == "run":
            command.add_argument("--keep", action="store_true", help="leave the endpoint up")
    commands.add_on_file("render", _render, "print the experiment with every default written out")
    commands.add("schema", _schema, "print the JSON Schema of an experiment, for editors")
    verify = commands.add("verify", _verify, "train a finished run again and compare every byte")
    verify.add_argument("run", metavar="RUN", help="its folder, as lepton_results/NAME/ID")
    verify.add_argument("--workers", type=count, default=1, help="to train on; default 1")
    verify.add_argument("--epochs", type=count, help="compare only the first ones; default all")
    add_address(verify)


def _init(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.init import init

    return init(
        options.data,
        output=options.output,
        target=options.target,
        force=options.force,
        terminal=terminal,
    )


def _plan(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.experiment import Experiment

    experiment = Experiment.load(options.file, options.settings)
    if options.cluster is None:
        plan = experiment.plan(address=options.address)
        terminal.say(plan.table())
        return plan.to_json()
    plan, fit = experiment.plan_on(options.cluster, prices=options.prices)
    terminal.say(f"{plan.table()}\n{fit.table()}")
    return {**plan.to_json(), "fit": fit.to_json()}


def _run(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.config import load

    if options.resume and getattr(options, "add_trials", None):
        raise InputError(
            "--resume goes on with a study that did not finish, --add-trials with one that did: "
            "give one of them"
        )

    experiment = load(options.file, options.settings)
    from lepton_ray.jobs.session import session_beside

    searches = experiment.tune is not None and options.command != "train"
    module = "lepton_ray.pipeline.search" if searches else "lepton_ray.pipeline.run"
    with session_beside(module, options.address):
        from lepton_ray.pipeline.run import Run

        result = Run(
            experiment,
            options.command,
            resume=options.resume,
            keep=getattr(options, "keep", False),
            address=options.address,
            terminal=terminal,
            add_trials=getattr(options, "add_trials", None),
            from_study=getattr(options, "from_study", None),
        ).go()
    terminal.say(f"done   in {result['seconds']:.0f} s")
    if options.command == "train":
        version = f"{result['register']['name']}/{result['register']['version']}"
        terminal.say(f"next   lepton-ray serve {version}, or lepton-ray models promote {version}")
    return result


def _render(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray import config

    experiment = config.load(options.file, options.settings)
    terminal.say(config.render(experiment).rstrip())
    return experiment.model_dump(mode="json")


def _schema(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.config import Experiment

    schema = Experiment.model_json_schema()
    terminal.say(json.dumps(schema, indent=1))
    return schema


def _verify(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.verify import verify

    return verify(
        options.run,
        workers=options.workers,
        epochs=options.epochs,
        address=options.address,
        terminal=terminal,
    )
