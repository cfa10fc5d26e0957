"""Metrics over a split, exact: every sample once, the same bytes for any number of replicas.

The split is cut into chunks of fixed size; a replica evaluates some of them, and the chunks' sums
are added in their order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lepton_ray.data.dataset import Samples
from lepton_ray.training.shards import block

CHUNK = 256  # samples of one forward pass; part of what the bytes depend on, so it is fixed


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """``loss`` (mean cross-entropy) and ``accuracy`` over a split. Collective over ``group``."""
    chunks = -(-len(samples) // CHUNK)
    replica, replicas = (group.rank(), group.size()) if group else (0, 1)
    mine = (
        block(replica, replicas, chunks)
        if replicas <= chunks
        else range(replica, min(replica + 1, chunks))
    )
    sums = torch.zeros(chunks, 2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for chunk in mine:
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        x, y = (
            torch.from_numpy(samples.x[rows]).to(device),
            torch.from_numpy(samples.y[rows]).to(device),
        )
        sums[chunk] = _chunk_sums(model(x), y)
    model.train(was_training)
    if group is not None and replicas > 1:
        dist.all_reduce(sums, group=group)  # every row is zero but on one replica: exact
    loss, correct = (sum(column.tolist()) for column in sums.T)
    return {"loss": loss / len(samples), "accuracy": correct / len(samples)}


def _chunk_sums(logits: Tensor, y: Tensor) -> Tensor:
    loss = torch.nn.functional.cross_entropy(logits.float(), y, reduction="sum")
    correct = (logits.argmax(1) == y).sum()
    return torch.stack([loss.double(), correct.double()])
