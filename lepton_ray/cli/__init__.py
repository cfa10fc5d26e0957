"""The command line: parse, call, print. Exit codes: 0 done, 1 the run failed, 2 wrong input,
70 a bug, 130 Ctrl-C, 141 nobody reads on.

Nothing heavy is imported before a command is known, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

from lepton_ray import __version__
from lepton_ray.cli import cluster, endpoints, experiments, models, status
from lepton_ray.cli.commands import Commands
from lepton_ray.cli.terminal import Terminal, UnreadError
from lepton_ray.errors import InputError, LeptonRayError

INTERRUPTED = 130  # what a shell expects after Ctrl-C
UNREAD = 141  # what a shell expects of a command whose reader went, as `head` does
UNEXPECTED = 70  # a bug, or a machine that fails: unlike 1, another try may do


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    atexit.register(gc.freeze)  # the end of Python looks through all that torch and MLflow hold
    terminal = Terminal(quiet=options.json)
    try:
        return _run(options, terminal)
    except UnreadError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the end complains too
        return UNREAD


def _run(options: argparse.Namespace, terminal: Terminal) -> int:
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
        terminal.result({"error": str(error), "kind": type(error).__name__})
        return error.exit_code
    except UnreadError:
        raise
    except Exception:
        logging.getLogger(__name__).exception("unexpected error")
        if log_file is None:
            raise
        terminal.error(f"error: unexpected, this is a bug; the log is {log_file}")
        traceback.print_exc()
        return UNEXPECTED
    terminal.result(result)
    return 0


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    whole = argparse.ArgumentParser(
        prog="lepton-ray",
        description="From data to a live model on an elastic Ray cluster, from one file.",
    )
    whole.add_argument("--version", action="version", version=f"lepton-ray {__version__}")
    commands = Commands(whole)
    for group in (experiments, models, endpoints, cluster, status):
        group.declare(commands)
    return whole


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
    # Their imports cut their loggers off from the root. Serve's takes 2 s.
    import ray

    if options.command in ("run", "serve"):
        import ray.serve  # noqa: F401

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return path


def _interrupted(options: argparse.Namespace) -> str:
    if options.command in ("run", "tune", "train"):
        words = [options.command, options.file, *(f"--set={s}" for s in options.settings)]
        return f"stopped; go on with: lepton-ray {shlex.join(words)} --resume"
    return "stopped"
