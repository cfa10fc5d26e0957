"""Peer: LitServe, batching as its documentation shows. ``serving_litserve.py MODEL PORT``."""

from __future__ import annotations

import sys

import litserve
import torch
from serving_models import answers, make, scaled

name, port = sys.argv[1:]


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = make(name)

    def decode_request(self, request: dict) -> torch.Tensor:
        return scaled([request["rows"][0]["image"]])[0]

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, x: torch.Tensor) -> list[dict[str, object]]:
        with torch.inference_mode():
            return answers(self.model(x))

    def unbatch(self, output: list[dict[str, object]]) -> list[dict[str, object]]:
        return output

    def encode_response(self, output: dict[str, object]) -> dict[str, object]:
        return {"predictions": [output]}


if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)
