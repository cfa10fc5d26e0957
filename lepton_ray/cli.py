"""The command line: parse, call, print. Exit codes: 0 done, 1 the run failed, 2 wrong input.

Nothing heavy is imported before a command is known, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lepton_ray import __version__
from lepton_ray.errors import InputError, LeptonRayError

PLAIN_PROGRESS_S = 10  # between two progress lines where they cannot be replaced
MODELS_TAKE = {  # least and most MODELs, and an example
    "show": (1, 1, "models show digits@champion"),
    "compare": (2, 9, "models compare digits/1 digits/2"),
    "promote": (1, 1, "models promote digits/2"),
    "rollback": (1, 1, "models rollback digits"),
}
INTERRUPTED = 130  # what a shell expects after Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    terminal = _Terminal(quiet=options.json)
    log_file = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as tidily as Ctrl-C
    try:
        log_file = _log_to_file(options)
        # Standard output is ours alone: Ray prints there by itself, and so may a person's model.
        with contextlib.redirect_stdout(sys.stderr):
            result = options.call(options, terminal)
    except KeyboardInterrupt:
        terminal.error(_interrupted(options))
        return INTERRUPTED
    except LeptonRayError as error:
        logging.getLogger(__name__).info("failed", exc_info=True)
        terminal.error(f"error: {error}")
        if options.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        return error.exit_code
    except Exception:
        logging.getLogger(__name__).exception("unexpected error")
        if log_file is None:
            raise
        terminal.error(f"error: unexpected, this is a bug; the log is {log_file}")
        raise
    if options.json:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lepton-ray",
        description="From data to a live model on an elastic Ray cluster, from one file.",
    )
    parser.add_argument("--version", action="version", version=f"lepton-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, call: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(call=call)
        command.add_argument("--json", action="store_true", help="print one JSON object only")
        return command

    def add_on_file(name: str, call: Any, text: str) -> argparse.ArgumentParser:
        command = add(name, call, text)
        command.add_argument("file", metavar="FILE", help="the experiment")
        command.add_argument(
            "--set",
            dest="settings",
            metavar="PATH=VALUE",
            action="append",
            default=[],
            help="change a setting, as in train.epochs=3 (may be repeated)",
        )
        return command

    init = add("init", _init, "write an experiment for a data folder or file, guesses explained")
    init.add_argument("data", metavar="DATA", help="images in class folders; CSV, Parquet, JSONL")
    init.add_argument("-o", "--output", metavar="FILE", help="default: NAME.yaml, after the data")
    init.add_argument("--target", metavar="NAME", help="the column to predict; default a guess")
    init.add_argument("--force", action="store_true", help="overwrite the file")
    plan = add_on_file("plan", _plan, "check all, run one real step, estimate; change nothing")
    verbs = {
        "run": "plan, tune, train, register, gate, promote and serve",
        "tune": "search the space of the experiment",
        "train": "train, evaluate and register a version, without a search",
    }
    for name, text in verbs.items():
        command = add_on_file(name, _run, text)
        command.add_argument("--resume", action="store_true", help="go on with the last run")
        command.add_argument(
            "--address", help="Ray cluster; default RAY_ADDRESS or an embedded one"
        )
        if name == "run":
            command.add_argument("--keep", action="store_true", help="leave the endpoint up")
    plan.add_argument("--address", help="Ray cluster; default RAY_ADDRESS or an embedded one")
    add_on_file("render", _render, "print the experiment with every default written out")
    add("schema", _schema, "print the JSON Schema of an experiment, for editors")

    models = add("models", _models, "list, show, compare, promote and roll back registered models")
    models.add_argument("action", choices=["list", *MODELS_TAKE])
    models.add_argument(
        "models", nargs="*", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION; NAME to roll back"
    )
    verify = add("verify", _verify, "train a finished run again and compare every byte")
    verify.add_argument("run", metavar="RUN", help="its folder, as lepton_results/NAME/ID")
    verify.add_argument("--workers", type=_count, default=1, help="to train on; default 1")
    verify.add_argument("--epochs", type=_count, help="compare only the first ones; default all")
    verify.add_argument("--address", help="Ray cluster; default RAY_ADDRESS or an embedded one")
    serve = add("serve", _serve, "serve a model over HTTP until Ctrl-C")
    serve.add_argument("model", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")
    serve.add_argument("--port", type=int, help="default: serve.port of the model's experiment")
    serve.add_argument("--address", help="Ray cluster; default RAY_ADDRESS or an embedded one")
    keys = add("keys", _keys, "create, list and revoke the keys of endpoints")
    keys.add_argument("action", choices=["create", "list", "revoke"])
    keys.add_argument("name", nargs="?", metavar="NAME", help="of the key: who or what uses it")
    keys.add_argument("--file", metavar="FILE", help="default: lepton_keys.json, as for serve")
    keys.add_argument(
        "--scope",
        action="append",
        choices=["predict", "explain", "admin"],
        help="what it may do (may be repeated); default predict; admin: everything, and /metrics",
    )
    keys.add_argument("--rate", type=_rate, help="requests a second; default no limit")
    predict = add("predict", _predict, "predict the rows of a file, or pictures")
    predict.add_argument("model", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")
    predict.add_argument(
        "data", nargs="+", metavar="DATA", help="a JSONL, CSV or Parquet file; pictures or folders"
    )
    predict.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _init(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.init import init

    return init(
        options.data,
        output=options.output,
        target=options.target,
        force=options.force,
        terminal=terminal,
    )


def _plan(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import Experiment

    plan = Experiment.load(options.file, options.settings).plan(address=options.address)
    terminal.say(plan.table())
    return plan.to_json()


def _run(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.config import load

    experiment = load(options.file, options.settings)
    from lepton_ray.pipeline import Run

    result = Run(
        experiment,
        options.command,
        resume=options.resume,
        keep=getattr(options, "keep", False),
        address=options.address,
        terminal=terminal,
    ).go()
    terminal.say(f"done   in {result['seconds']:.0f} s")
    return result


def _render(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray import config

    experiment = config.load(options.file, options.settings)
    terminal.say(config.render(experiment).rstrip())
    return experiment.model_dump(mode="json")


def _schema(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.config import Experiment

    schema = Experiment.model_json_schema()
    terminal.say(json.dumps(schema, indent=1))
    return schema


def _models(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import promotion
    from lepton_ray.tracking import registry

    given = options.models
    if options.action == "list":
        if len(given) > 1:
            raise InputError("models list takes one NAME or none")
        return _list_models(registry.versions(given[0] if given else None), terminal)
    least, most, example = MODELS_TAKE[options.action]
    if not least <= len(given) <= most:
        raise InputError(f"models {options.action} needs a MODEL, as in {example}")
    if options.action == "promote":
        return promotion.promote(given[0], terminal)
    if options.action == "rollback":
        return promotion.rollback(given[0], terminal)
    if options.action == "compare":
        return promotion.compare(given, terminal)
    version = registry.resolve(given[0])
    value = {**_version_json(version), "manifest": registry.manifest(version)}
    terminal.say(json.dumps(value, indent=1))
    return value


def _list_models(found: list[Any], terminal: _Terminal) -> dict[str, Any]:
    for v in found:
        metric = "accuracy" if "test_accuracy" in v.tags else "mae"
        measured = f"{metric} {v.tags.get(f'test_{metric}', '-')[:6]}"
        terminal.say(
            f"{v.name + '/' + str(v.version):30} {','.join(v.aliases):12} {measured:16} weights "
            f"{v.tags.get('lepton_ray.weights_sha256', '-')[:12]}"
        )
    if not found:
        terminal.say("no models registered yet")
    return {"models": [_version_json(v) for v in found]}


def _version_json(version: Any) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "mlflow_run": version.run_id,
        "tags": version.tags,
    }


def _serve(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.models import serve_model

    return serve_model(options.model, port=options.port, address=options.address, terminal=terminal)


def _keys(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.serving import keys

    path = Path(options.file or keys.DEFAULT_FILE)
    if options.action == "list":
        found = keys.read(path)
        for k in found:
            rate = "no limit" if k.rate_per_s is None else f"{k.rate_per_s:g} a second"
            terminal.say(f"{k.id}  {k.name:20} {','.join(k.scopes):16} {rate:14} {k.created}")
        # Not the SHA-256: it is of no use to a reader.
        shown = ("id", "name", "scopes", "rate_per_s", "created")
        return {"keys": [{name: getattr(k, name) for name in shown} for k in found]}
    if not options.name:
        raise InputError(f"keys {options.action} needs a NAME, as in keys {options.action} website")
    if options.action == "revoke":
        gone = keys.revoke(path, options.name)
        terminal.say(f"revoked {gone.id} ({gone.name}) in {path}; endpoints refuse it in seconds")
        return {"id": gone.id, "name": gone.name, "file": str(path)}
    scopes = tuple(options.scope or ["predict"])
    text = keys.create(path, options.name, scopes, options.rate)
    terminal.say(f"{text}\nshown this once; {path} keeps only its SHA-256")
    return {"key": text, "name": options.name, "file": str(path)}


def _verify(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.verify import verify

    return verify(
        options.run,
        workers=options.workers,
        epochs=options.epochs,
        address=options.address,
        terminal=terminal,
    )


def _predict(options: argparse.Namespace, terminal: _Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.models import predict_file

    return predict_file(options.model, options.data, output=options.output, terminal=terminal)


class _Terminal:
    """Lines for a person; with ``--json`` only errors, on standard error."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._out = sys.stdout
        self._live = sys.stdout.isatty() and not quiet
        self._transient = False
        self._told_at = time.monotonic()

    def say(self, text: str) -> None:
        logging.getLogger(__name__).info("%s", text)
        if not self._quiet:
            self._clear()
            print(text, file=self._out, flush=True)

    def progress(self, text: str) -> None:
        if not self._live:
            if not self._quiet and time.monotonic() - self._told_at >= PLAIN_PROGRESS_S:
                self._told_at = time.monotonic()
                print(text, file=self._out, flush=True)
        else:
            width = os.get_terminal_size().columns
            print(f"\r\x1b[K{text[: width - 1]}", end="", file=self._out, flush=True)
            self._transient = True

    def error(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._transient:
            print("\r\x1b[K", end="", file=self._out)
            self._transient = False


def _log_to_file(options: argparse.Namespace) -> Path | None:
    """Everything logged goes to a file; nothing of it to the screen."""
    if options.command not in ("run", "tune", "train", "serve", "verify"):
        logging.getLogger().addHandler(logging.NullHandler())
        return None
    folder = Path("lepton_results") / "logs"
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.command}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    except OSError as error:
        raise InputError(f"the log folder {folder} cannot be written: {error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    logging.captureWarnings(True)
    # MLflow and Ray would put handlers of their own on the screen.
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
    import ray.serve  # noqa: F401 - its import cuts its loggers off from the root

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return path


def _interrupted(options: argparse.Namespace) -> str:
    if options.command in ("run", "tune", "train"):
        words = [options.command, options.file, *(f"--set={s}" for s in options.settings)]
        return f"stopped; go on with: lepton-ray {shlex.join(words)} --resume"
    return "stopped"


if __name__ == "__main__":
    sys.exit(main())
