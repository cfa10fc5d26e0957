"""What the OpenAPI page says of bodies and refusals, which FastAPI cannot find out by itself."""

from __future__ import annotations

from typing import Any

from lepton_ray.data.schema import Schema
from lepton_ray.serving import bodies, tensors
from lepton_ray.serving.requests import row_schema

Responses = dict[int | str, dict[str, Any]]

ANY = {429: "It is busy, or the key's rate is used up.", 503: "No answer in time."}
KEYED = {401: "No key, or an unknown one.", 403: "The key may not do this."}
BODY = {
    408: "The body does not arrive in time.",
    413: "The body, or what it unpacks to, is too large, or has too many rows.",
    415: "Another Content-Type than the model takes, or a compressed body.",
    422: "The body breaks a rule.",
}
NAMED = {404: "Another model or version is served."}
_TEXT = {"type": "string"}


def rows(schema: Schema) -> dict[str, Any]:
    """The body of a request with rows; the endpoint checks it in one pass of NumPy."""
    asked = {
        "type": "object",
        "properties": {"rows": {"type": "array", "minItems": 1, "items": row_schema(schema)}},
        "required": ["rows"],
        "additionalProperties": False,
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    others = {kind: binary for kind in bodies.types_for(schema) if kind != bodies.JSON}
    content = {bodies.JSON: {"schema": asked}, **others}
    return {"requestBody": {"required": True, "content": content}}


def inference() -> dict[str, Any]:
    """The body of a request of the Open Inference Protocol."""
    schema = {
        "type": "object",
        "properties": {
            "id": _TEXT,
            "inputs": {"type": "array", "minItems": 1, "items": _tensor()},
            "outputs": {"type": "array"},
            "parameters": {"type": "object"},
        },
        "required": ["inputs"],
    }
    return {"requestBody": {"required": True, "content": {bodies.JSON: {"schema": schema}}}}


def inferred() -> Responses:
    """Its answer."""
    schema = {
        "type": "object",
        "properties": {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "outputs": {"type": "array", "items": _tensor()},
        },
        "required": ["model_name", "model_version", "outputs"],
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {bodies.JSON: {"schema": schema}, "application/octet-stream": binary}
    return {
        200: {"description": "The outputs; binary ones are behind the JSON.", "content": content}
    }


def refusals(*, keys: bool, body: bool = False, v2: bool = False, named: bool = False) -> Responses:
    """How a route says no, see `refusals.answer`.

    Args:
        keys: requests need one.
        body: the route reads one.
        v2: of the Open Inference Protocol.
        named: the path names a model.
    """
    texts = {**ANY, **(KEYED if keys else {}), **(BODY if body else {}), **(NAMED if named else {})}
    detail: dict[str, Any] = _TEXT
    problem = {
        "type": "object",
        "properties": {"row": {"type": "integer"}, "field": _TEXT, "rule": _TEXT, "value": _TEXT},
        "required": ["row", "field", "rule", "value"],
    }
    found: Responses = {}
    for status, description in sorted(texts.items()):
        of = {"anyOf": [{"type": "array", "items": problem}, detail]} if status == 422 else detail
        name, of = ("error", detail) if v2 else ("detail", of)
        schema = {"type": "object", "properties": {name: of}, "required": [name]}
        found[status] = {
            "description": description,
            "content": {bodies.JSON: {"schema": schema}},
        }
    return found


def _tensor() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": _TEXT,
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"enum": ["BYTES", *tensors.NUMBERS]},
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
        "required": ["name", "shape", "datatype"],
    }
