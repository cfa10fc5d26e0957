"""Peer: Ray Serve at its defaults, eager torch. ``serving_rayserve.py MODEL PORT``.

No ``from __future__ import annotations``: FastAPI would not find the types of such a class.
"""

import sys
import threading

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

api = FastAPI()


class Row(BaseModel):
    image: list[list[float]]


class Request(BaseModel):
    rows: list[Row]


@serve.deployment
@serve.ingress(api)
class Peer:
    def __init__(self, name: str) -> None:
        from serving_models import make

        torch.set_num_threads(1)
        self.model = make(name)

    @api.post("/predict")
    async def predict(self, request: Request) -> dict[str, object]:
        from serving_models import answers, scaled

        x = scaled([row.image for row in request.rows])
        with torch.inference_mode():
            return {"predictions": answers(self.model(x))}


if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Peer.bind(sys.argv[1]), logging_config={"enable_access_log": False})
    threading.Event().wait()
