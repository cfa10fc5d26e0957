"""One optimizer step, exact: the same bytes for any number of replicas.

Each hosted shard has its own forward and backward of the same shape, with its own randomness and
with the buffers (BatchNorm) the step began with. The shards' gradients, buffer changes and loss
are added in the fixed tree, here and over the replicas, while the last shard's backward still
runs. Nothing of the state changes before the sums are complete, so a step that fails can be done
again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lepton_ray.config.schema import Train
from lepton_ray.data.order import key
from lepton_ray.training.batches import Batch
from lepton_ray.training.determinism import seed_everything
from lepton_ray.training.membership import Peers
from lepton_ray.training.optimization import learning_rate_factor
from lepton_ray.training.reduction import Reduction, buckets, hosted
from lepton_ray.training.shards import merges
from lepton_ray.training.state import TrainState

Loss = Callable[[Tensor, Tensor], Tensor]


class TrainStep:
    """Runs steps on one replica.

    Args:
        train: settings of the run.
        total_steps: of the whole run, for the schedule.
        loss: (output, target) -> mean loss of one shard's samples.
        fetch: (step, shard) -> that shard's batch, on the device.

    Call `join` before the first step, and again for every generation.
    """

    def __init__(
        self,
        state: TrainState,
        train: Train,
        *,
        total_steps: int,
        loss: Loss,
        fetch: Callable[[int, int], Batch],
        device: torch.device,
    ) -> None:
        self._state = state
        self._train = train
        self._total_steps = total_steps
        self._loss = loss
        self._fetch = fetch
        self._device = device
        self._forward = torch.compile(state.model) if train.compile else state.model
        self._shards = train.n_shards
        self._parameters = [p for p in state.model.parameters() if p.requires_grad]
        self._buffer_places = [
            (module, name)
            for module in state.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        # What is added over the shards: the gradients, then the buffers' changes, the loss and the
        # wish. Those behind the gradients are known before the backward and travel in its last
        # bucket.
        numels = [p.numel() for p in self._parameters]
        self._buckets = buckets(numels)
        tail = [*map(_numel, self._buffers), 1, 1]
        self._buckets[-1] += range(len(numels), len(numels) + len(tail))
        self._numels = [*numels, *tail]
        self._reductions: list[Reduction] = []
        self._sent = 0
        self.wished = False
        """Whether any replica wished for the next generation when the last step began."""

    def join(self, peers: Peers) -> None:
        """Do the next steps with these; again when their ``hosts`` are others."""
        self._hosted = hosted(peers, peers.rank, self._shards)
        self._merges = merges(self._hosted, self._shards)
        self._reductions = []
        if peers.size > 1:
            self._reductions = [
                Reduction([self._numels[i] for i in bucket], self._shards, peers, self._device)
                for bucket in self._buckets
            ]

    def rehearse(self) -> None:
        """Forward and backward of one shard for nothing: what is compiled, loaded or allocated the
        first time is not waited for by others then."""
        before = [b.clone() for b in self._buffers]
        try:
            self._loss_of(0, 0, before).backward()
        finally:
            self._restore(before)
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def hosted(self) -> int:
        """How many shards are this replica's."""
        return len(self._hosted)

    @property
    def _buffers(self) -> list[Tensor]:
        """Looked up, since a model may put another tensor in a buffer's place."""
        return [getattr(module, name).detach() for module, name in self._buffer_places]

    def leave(self) -> None:
        """Let go of what is in flight with replicas of which one is lost."""
        self._reductions = []

    def run(self, *, wish: bool = False) -> None:
        """Do step ``state.step`` and count it; ``state.loss`` is then the mean over the batch.

        Args:
            wish: for the next generation; `wished` then tells all replicas at the same step.

        Raises:
            LostPeerError: when a replica is gone; the state is that before the step.
        """
        state, step = self._state, self._state.step
        before = [b.clone() for b in self._buffers]
        try:
            reduced = self._reduced(step, before, wish)
        except BaseException:
            self._restore(before)
            raise
        self._apply(reduced, before, step)
        state.loss = reduced[-2].clone()
        self.wished = bool(reduced[-1] > 0)
        state.step += 1

    def _reduced(self, step: int, before: list[Tensor], wish: bool) -> list[Tensor]:
        """Gradients, buffer changes, loss and wish: added over all shards, and scaled."""
        if not self._hosted:
            for reduction in self._reductions:
                reduction.start([])
            return self._gather()
        stack: list[list[Tensor]] = []
        for shard, additions in zip(self._hosted, self._merges, strict=True):
            loss = self._loss_of(step, shard, before)
            tail = self._tail(shard, before, loss, wish)
            if self._reductions and shard == self._hosted.stop - 1:
                return self._backward_and_reduce(loss, tail, stack, additions)
            loss.backward()
            stack.append([*self._take_gradients(), *tail])
            for _ in range(additions):
                right = stack.pop()
                torch._foreach_add_(stack[-1], right)
        (reduced,) = stack
        torch._foreach_mul_(reduced, 1.0 / self._shards)
        return reduced

    def reduced_gradients(self) -> list[Tensor]:
        """The gradients the last step applied, after clipping; valid until the next step."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def _loss_of(self, step: int, shard: int, before: list[Tensor]) -> Tensor:
        """Forward of one shard, ready for its backward to leave gradients in ``.grad``."""
        self._restore(before)
        for parameter in self._parameters:
            parameter.grad = None
        x, y = self._fetch(step, shard)
        if self._train.exact:
            seed_everything(key(self._train.seed, "shard", step, shard), self._device)
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._train.precision == "bf16"
        ):
            return self._loss(self._forward(x), y)

    def _take_gradients(self) -> list[Tensor]:
        """The gradients of one shard; zeros for a parameter it did not use."""
        return [
            p.grad if p.grad is not None else torch.zeros_like(p, requires_grad=False)
            for p in self._parameters
        ]

    def _tail(self, shard: int, before: list[Tensor], loss: Tensor, wish: bool) -> list[Tensor]:
        """Buffer changes of one shard as float32, loss, wish.

        Changes rather than values: a buffer nobody changes, one that holds infinities too, stays
        the same bytes for any shards. What is not of floats is shard 0's, byte by byte: each is a
        float32, so that a sum with zeros keeps it.
        """
        changes = []
        for now, then in zip(self._buffers, before, strict=True):
            if now.is_floating_point():
                changes.append(torch.where(now == then, 0.0, now - then))
            else:
                content = now.reshape(-1).view(torch.uint8)
                changes.append((content if shard == 0 else torch.zeros_like(content)).float())
        return [*changes, loss.detach().float().reshape(1), torch.full_like(loss, wish).reshape(1)]

    def _backward_and_reduce(
        self, loss: Tensor, tail: list[Tensor], stack: list[list[Tensor]], additions: int
    ) -> list[Tensor]:
        """The last hosted shard's backward; each bucket leaves as soon as it is complete."""
        self._sent = 0
        complete = [False] * len(self._buckets)
        parameters = len(self._parameters)
        handles = []
        for number, bucket in enumerate(self._buckets):
            indices = [index for index in bucket if index < parameters]
            missing = {"count": len(indices)}

            def ready(
                _: nn.Parameter, number: int = number, missing: dict[str, int] = missing
            ) -> None:
                missing["count"] -= 1
                complete[number] = missing["count"] == 0
                # Collectives are matched by their order, so buckets leave in order everywhere,
                # also where a replica's last shard does not use some parameter.
                while self._sent < len(complete) and complete[self._sent]:
                    self._send(tail, stack, additions)

            for index in indices:
                parameter = self._parameters[index]
                handles.append(parameter.register_post_accumulate_grad_hook(ready))
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        while self._sent < len(self._buckets):  # held up by a parameter this shard did not use
            self._send(tail, stack, additions)
        return self._gather()

    def _gather(self) -> list[Tensor]:
        """What all buckets add up to, once every replica has sent its own."""
        for reduction in self._reductions:
            reduction.gather()
        reduced: list[Tensor] = [torch.empty(0)] * len(self._numels)
        for bucket, reduction in zip(self._buckets, self._reductions, strict=True):
            for index, flat in zip(bucket, reduction.finish(), strict=True):
                is_gradient = index < len(self._parameters)
                reduced[index] = flat.view_as(self._parameters[index]) if is_gradient else flat
        return reduced

    def _send(self, tail: list[Tensor], stack: list[list[Tensor]], additions: int) -> None:
        """Close the tree over the last shard's part of the next bucket, and send the sums of all
        subtrees."""
        indices = self._buckets[self._sent]
        last = []
        for index in indices:
            if index >= len(self._parameters):
                last.append(tail[index - len(self._parameters)])
                continue
            parameter = self._parameters[index]
            last.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        whole = len(stack) - additions
        for left in reversed(stack[whole:]):
            last = [torch.add(left[i], value) for i, value in zip(indices, last, strict=True)]
        sums = [[values[i] for i in indices] for values in stack[:whole]]
        self._reductions[self._sent].start([*sums, last])
        self._sent += 1

    def _restore(self, before: list[Tensor]) -> None:
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def _apply(self, reduced: list[Tensor], before: list[Tensor], step: int) -> None:
        train, state = self._train, self._state
        gradients = reduced[: len(self._parameters)]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        if train.clip is not None:
            norm = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(g.reshape(-1)) for g in gradients])
            )
            torch._foreach_mul_(gradients, (train.clip / (norm + 1e-6)).clamp(max=1.0))
        changes = reduced[len(self._parameters) : -2]
        for buffer, then, change in zip(self._buffers, before, changes, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(then + change.view_as(buffer))
            else:  # shard 0's alone, scaled by 1 / shards on the way
                content = (change.reshape(-1) * self._shards).round().to(torch.uint8)
                buffer.copy_(content.view(buffer.dtype).view_as(buffer))
        factor = learning_rate_factor(train.schedule, step, self._total_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = train.optimizer.lr * factor
        state.optimizer.step()
        if state.averaged is not None and train.ema is not None:
            _average(state.averaged, state.model, train.ema)


def _numel(buffer: Tensor) -> int:
    """How many numbers of a buffer travel, see `TrainStep._tail`."""
    return buffer.numel() * (1 if buffer.is_floating_point() else buffer.element_size())


def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, now in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1.0 - decay)
    for copied, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)
