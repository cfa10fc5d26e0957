"""Peer: FastAPI and uvicorn. ``serving_fastapi.py MODEL torch|ort PORT FOLDER``."""

from __future__ import annotations

import sys

import onnxruntime
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from serving_models import answers, make, scaled

name, runtime, port, folder = sys.argv[1:]
torch.set_num_threads(1)
api = FastAPI()


class Row(BaseModel):
    image: list[list[float]]


class Request(BaseModel):
    rows: list[Row]


if runtime == "torch":
    model = make(name)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

else:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options)
    given = session.get_inputs()[0].name

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {given: x.numpy()})[0])


@api.post("/predict")
async def predict(request: Request) -> dict[str, object]:
    x = scaled([row.image for row in request.rows])
    return {"predictions": answers(forward(x))}


uvicorn.run(api, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
