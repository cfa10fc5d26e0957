"""The page of an endpoint: one file made from its version's schema, which loads nothing else."""

from __future__ import annotations

import html
import json
import re
import secrets
from functools import cache
from importlib import resources
from typing import Any

from lepton_ray.serving.runtime import Runtime

HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page(runtime: Runtime, *, keys: bool, explain: bool) -> tuple[str, dict[str, str]]:
    """The page, and the headers that go with it.

    Args:
        keys: whether requests need one. Then the page, which everybody can open, knows nothing of
            the model until it has fetched `model` with a person's key.
    """
    shown = None if keys else model(runtime, explain=explain)
    nonce = secrets.token_urlsafe(16)
    put = {
        "title": "lepton_ray" if keys else html.escape(runtime.name),
        # In a script element "<" could end it, in any text that a person's data hold.
        "model": json.dumps(shown).replace("<", "\\u003c"),
        "nonce": nonce,
    }
    content = re.sub(r"\$(title|model|nonce)\b", lambda found: put[found[1]], _template())
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return content, {**HEADERS, "content-security-policy": policy}


def model(runtime: Runtime, *, explain: bool) -> dict[str, Any]:
    """What the page makes its fields from."""
    schema = runtime.schema
    return {
        "name": runtime.name,
        "version": runtime.version,
        "columns": [vars(column) for column in schema.columns],
        "classes": schema.classes,
        "target": schema.target,
        "explain": explain,
        "examples": runtime.examples,
    }


@cache
def _template() -> str:
    return resources.files("lepton_ray.serving").joinpath("page.html").read_text("utf-8")
