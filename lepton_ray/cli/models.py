"""Commands on registered models."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lepton_ray.cli.commands import Commands, add_address
from lepton_ray.cli.terminal import Terminal
from lepton_ray.errors import InputError

MODELS_TAKE = {  # least and most MODELs, and an example
    "show": (1, 1, "models show digits@champion"),
    "compare": (2, 9, "models compare digits/1 digits/2"),
    "promote": (1, 1, "models promote digits/2"),
    "rollback": (1, 1, "models rollback digits"),
    "canary": (1, 1, "models canary digits/8=10%, or models canary digits to end it"),
    "shadow": (1, 1, "models shadow digits/9, or models shadow digits to end it"),
}


def declare(commands: Commands) -> None:
    """Add models, predict, optimize and explain."""
    models = commands.add(
        "models", _models, "list, show, compare, promote, try and roll back models"
    )
    models.add_argument("action", choices=["list", *MODELS_TAKE])
    models.add_argument(
        "models", nargs="*", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION; NAME to roll back"
    )
    predict = commands.add("predict", _predict, "predict the rows of a file, or pictures")
    predict.add_argument("model", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")
    predict.add_argument(
        "data", nargs="+", metavar="DATA", help="JSONL, CSV or Parquet files; pictures; folders"
    )
    predict.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=".jsonl, .csv or .parquet; the same call goes on with one that was stopped; default: "
        "JSON lines on standard output",
    )
    predict.add_argument(
        "--keep",
        metavar="COLUMN",
        action="append",
        default=[],
        help="of the input, to repeat before each answer (may be repeated)",
    )
    add_address(predict)
    optimize = commands.add(
        "optimize", _optimize, "register a faster or smaller form of a model, if one is good enough"
    )
    optimize.add_argument("model", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")
    optimize.add_argument("--smallest", action="store_true", help="instead of the fastest")
    optimize.add_argument(
        "--gpu",
        action="store_true",
        help="the fastest on this machine's GPU, for endpoints with serve.gpus",
    )
    optimize.add_argument(
        "--lose",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="accuracy (or R2) that a form may lose; default 0.005",
    )
    optimize.add_argument(
        "--distill", action="store_true", help="also train a smaller model on its answers"
    )
    optimize.add_argument(
        "--prune", action="store_true", help="also cut its weakest channels out, and fine-tune"
    )
    optimize.add_argument(
        "--student",
        metavar="NAME=VALUE",
        help="the model's setting that these have smaller; default half the width",
    )
    explain = commands.add("explain", _explain, "say why rows or pictures are answered so")
    explain.add_argument("model", metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")
    explain.add_argument("data", nargs="+", metavar="DATA", help="as for predict")
    explain.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=".jsonl, or .png for the heat map of one picture; default: lines of JSON",
    )
    explain.add_argument(
        "--method",
        help="integrated_gradients (default where possible), kernel_shap, lime, occlusion",
    )
    explain.add_argument("--target", metavar="CLASS", help="default: the likeliest of each row")


def _models(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    given = options.models
    if options.action == "list":
        if len(given) > 1:
            raise InputError("models list takes one NAME or none")
    else:
        least, most, example = MODELS_TAKE[options.action]
        if not least <= len(given) <= most:
            raise InputError(f"models {options.action} needs a MODEL, as in {example}")

    from lepton_ray.pipeline import switching
    from lepton_ray.tracking import registry

    if options.action == "list":
        return _list_models(registry.versions(given[0] if given else None), terminal)
    if options.action == "rollback":
        return switching.rollback(given[0], terminal)
    if options.action == "shadow":
        return switching.shadow(given[0], terminal)
    if options.action in ("promote", "canary", "compare"):
        from lepton_ray.pipeline import promotion  # and torch, which takes 3 s

        if options.action == "promote":
            return promotion.promote(given[0], terminal)
        if options.action == "canary":
            return promotion.canary(given[0], terminal)
        return promotion.compare(given, terminal)
    version = registry.resolve(given[0])
    from lepton_ray.pipeline import carried

    value = {
        **_version_json(version),
        "manifest": registry.manifest(version),
        "importance": carried.importance(version),
    }
    terminal.say(json.dumps(value, indent=1))
    return value


def _list_models(found: list[Any], terminal: Terminal) -> dict[str, Any]:
    for v in found:
        metric = "accuracy" if "test_accuracy" in v.tags else "mae"
        value = v.tags.get(f"test_{metric}")
        measured = f"{metric} {float(value):.4f}" if value else f"{metric} -"
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


def _predict(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import batch

    return batch.predict(
        options.model,
        options.data,
        output=options.output,
        keep=options.keep,
        address=options.address,
        terminal=terminal,
    )


def _explain(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import explaining

    return explaining.explain(
        options.model,
        options.data,
        output=options.output,
        method=options.method,
        target=options.target,
        terminal=terminal,
    )


def _optimize(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline.optimize import optimize

    asked = {"distilled": options.distill, "pruned": options.prune}
    return optimize(
        options.model,
        smallest=options.smallest,
        lose=options.lose,
        terminal=terminal,
        methods=[method for method, wanted in asked.items() if wanted],
        student=options.student,
        device="cuda" if options.gpu else "",
    )
