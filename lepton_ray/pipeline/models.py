"""What is done with a registered version: serve it, predict with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lepton_ray.config import load
from lepton_ray.data import frames
from lepton_ray.jobs import session
from lepton_ray.jobs.watchers import Terminal
from lepton_ray.serving import endpoint
from lepton_ray.serving.load import load_model
from lepton_ray.tracking import registry


def serve_model(
    reference: str, *, port: int | None, address: str | None, terminal: Terminal
) -> dict[str, Any]:
    """Serve a registered version until Ctrl-C, as its own experiment says."""
    version = registry.resolve(reference)
    settings = load(version.folder() / "experiment.yaml").serve
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    if session.is_embedded(address):
        endpoint.check_port(settings.host, settings.port)
    with session.session(address), endpoint.serving(reference, settings) as live:
        terminal.say(
            f"serve  {version.name}/{version.version} on {live.url}; docs at {live.url}/docs"
        )
        live.keep(terminal.say)
    return {"url": live.url, "name": version.name, "version": version.version}


def predict_file(
    reference: str, path: str, *, output: str | None, terminal: Terminal
) -> dict[str, Any]:
    """Predict every row of a JSONL, CSV or Parquet file; one JSON line a row."""
    runtime = load_model(reference)
    texts = [c.name for c in runtime.schema.columns if c.kind == "text"]
    rows = frames.read_rows(Path(path), texts)
    answers = runtime.predict(rows)
    lines = [answer.model_dump_json() for answer in answers]
    if output is None:
        for line in lines:
            terminal.say(line)
    else:
        Path(output).write_text("".join(line + "\n" for line in lines))
        terminal.say(f"{len(lines)} predictions written to {output}")
    return {"rows": len(lines), "output": output}
