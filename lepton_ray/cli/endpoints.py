"""Commands on endpoints and their keys."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lepton_ray.cli.commands import Commands, add_address, add_settings
from lepton_ray.cli.terminal import Terminal
from lepton_ray.errors import InputError


def declare(commands: Commands) -> None:
    """Add serve and keys."""
    serve = commands.add("serve", _serve, "serve a model over HTTP until Ctrl-C")
    serve.add_argument("model", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")
    serve.add_argument("--port", type=int, help="default: serve.port of the model's experiment")
    add_settings(serve, "serve.keys=lepton_keys.json")
    serve.add_argument("--canary", metavar="MODEL[=SHARE]", help="try a version: digits/8=10%%")
    serve.add_argument("--shadow", metavar="MODEL", help="send a version copies of the traffic")
    serve.add_argument("--detach", action="store_true", help="leave it up on the cluster")
    serve.add_argument("--stop", action="store_true", help="end one that was left up")
    add_address(serve)
    keys = commands.add("keys", _keys, "create, list and revoke the keys of endpoints")
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


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _serve(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import models

    if options.stop:
        return models.stop_serving(options.model, address=options.address, terminal=terminal)
    return models.serve_model(
        options.model,
        port=options.port,
        settings=options.settings,
        address=options.address,
        canary=options.canary,
        shadow=options.shadow,
        detach=options.detach,
        terminal=terminal,
    )


def _keys(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
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
