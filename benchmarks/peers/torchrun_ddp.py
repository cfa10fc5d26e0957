"""Peer of benchmarks/recovery.py: a worker of torchrun, with a checkpoint every 20 steps.

Says what it does by a line per step tried: time, step, process, rank, replicas.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

log, step_s, save_every = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
net = DistributedDataParallel(torch.nn.Linear(784, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
step, kept = 0, f"{log}.checkpoint"
if os.path.exists(kept):
    state = torch.load(kept, weights_only=True)
    net.module.load_state_dict(state["model"])
    step = state["step"]
while True:
    time.sleep(step_s)
    with open(log, "a") as file:
        file.write(f"{time.time()} {step} {os.getpid()} {rank} {size}\n")
    optimizer.zero_grad()
    net(torch.randn(16, 784)).square().mean().backward()
    optimizer.step()
    step += 1
    if rank == 0 and step % save_every == 0:
        torch.save({"model": net.module.state_dict(), "step": step}, f"{kept}.new")
        os.replace(f"{kept}.new", kept)
