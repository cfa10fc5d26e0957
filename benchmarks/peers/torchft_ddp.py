"""Peer of benchmarks/recovery.py: one replica of torchft's own data parallelism.

As in torchft's example train_ddp.py, with its time-outs shortened by hand, but gradients go through
the manager's allreduce by hand: in 0.2.0 its DistributedDataParallel ends the survivors too (an
assertion of its hook, ``assert fut._fut``, fails where gloo reports the lost peer), and
PureDistributedDataParallel does not wait for the sums. Says what it does by a line per step tried:
time, step, process, rank, replicas.
"""

import os
import sys
import time
from datetime import timedelta

import torch
from torch.distributed import TCPStore
from torchft import Manager, Optimizer, ProcessGroupGloo

log, step_s = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(784, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def load_state(state: dict) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
    min_replica_size=1,
    load_state_dict=load_state,
    state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
    replica_id=f"replica_{os.getpid()}",
    store_addr="127.0.0.1",
    store_port=store.port,
    rank=0,
    world_size=1,
    timeout=timedelta(seconds=5),
    quorum_timeout=timedelta(seconds=20),
    use_async_quorum=False,
)
managed = Optimizer(manager, optimizer)
while True:
    managed.zero_grad()  # asks for a quorum, which is answered beside the forward pass
    time.sleep(step_s)
    loss = model(torch.randn(16, 784)).square().mean()
    step, size, rank = manager.current_step(), manager.num_participants(), None
    if manager.is_participating():
        rank = manager.participating_rank()
        with open(log, "a") as file:
            file.write(f"{time.time()} {step} {os.getpid()} {rank} {size}\n")
    loss.backward()
    for sent in [manager.allreduce(parameter.grad) for parameter in model.parameters()]:
        sent.wait()
    managed.step()
