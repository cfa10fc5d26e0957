"""A model's outputs for a split: every sample once, the same bytes for any number of replicas.

The split is cut into chunks of fixed size, and a replica evaluates some of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lepton_ray.data.dataset import Samples
from lepton_ray.training.membership import Peers
from lepton_ray.training.shards import block

CHUNK = 256  # samples of one forward pass; part of what the bytes depend on, so it is fixed


@torch.no_grad()
def outputs(
    model: nn.Module,
    samples: Samples,
    *,
    width: int,
    device: torch.device,
    peers: Peers,
) -> Tensor:
    """[n, width] The model's outputs for a split, on every replica. Collective over ``peers``."""
    chunks = -(-len(samples) // CHUNK)
    replica, replicas = peers.rank, peers.hosts
    mine = (
        block(replica, replicas, chunks)
        if replica < replicas <= chunks
        else range(replica, min(replica + 1, replicas, chunks))
    )
    whole = torch.zeros(len(samples), width, device=device)
    was_training = model.training
    model.eval()
    for chunk in mine:
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        whole[rows] = model(torch.from_numpy(samples.x[rows]).to(device)).float()
    model.train(was_training)
    peers.add(whole)  # every row is zero but on one replica: exact
    return whole
