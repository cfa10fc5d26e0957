"""Weights of a sample's parts, by captum.

Sources: integrated gradients, Sundararajan et al. 2017; LIME, Ribeiro et al. 2016; Kernel SHAP,
Lundberg and Lee 2017; occlusion, Zeiler and Fergus 2014.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lepton_ray.serving.explain.answers import METHODS
from lepton_ray.serving.explain.sample import Sample

STEPS = (32, 64, 128, 256, 512, 1024)  # of the integral; the next when the one before is too rough
COMPLETE = 0.05  # of the difference, that the weights' sum may miss
AT_A_TIME = 64  # samples of one forward pass
DRAWS = 1024  # random subsets of parts, at most

Outputs = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Weights:
    values: Tensor
    """[parts]"""
    full: float
    """The explained output for the sample."""
    empty: float
    """The same for the baseline."""
    evaluations: int
    """Steps of the integral, or samples the model answered."""

    @property
    def error(self) -> float:
        """How far the weights' sum is from the difference of the two outputs."""
        return abs(float(self.values.sum()) - (self.full - self.empty))

    @property
    def complete(self) -> bool:
        return self.error <= COMPLETE * abs(self.full - self.empty)


def explain(sample: Sample, method: str, answer: Outputs, target: int) -> Weights:
    """Weights of the parts for one output.

    Args:
        method: one of `answers.METHODS`.
        answer: the model's outputs -> what is explained [n, outputs].
        target: which of these.

    Raises:
        ValueError: for integrated gradients of a sample without gradients.
        OverflowError: when the answer to it, or to the baseline, is not finite.
    """
    if not sample.parts:  # a text without words
        full, empty = _ends(lambda z: answer(sample.rough(z))[:, target], sample)
        return Weights(values=torch.zeros(0), full=full, empty=empty, evaluations=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's, about its own defaults
        return BY_NAME[method](sample, answer, target)


def _integrated_gradients(sample: Sample, answer: Outputs, target: int) -> Weights:
    from captum.attr import IntegratedGradients

    if sample.smooth is None:
        raise ValueError("the model has no gradients by word")
    smooth = sample.smooth

    def function(z: Tensor) -> Tensor:
        return answer(smooth(z))[:, target]

    there, none = torch.ones(1, sample.parts), torch.zeros(1, sample.parts)
    full, empty = _ends(function, sample)
    for steps in STEPS:
        values = IntegratedGradients(function).attribute(
            there, none, n_steps=steps, internal_batch_size=AT_A_TIME
        )
        found = Weights(values=values[0].detach(), full=full, empty=empty, evaluations=steps)
        if found.complete:
            break
    return found


def _occlusion(sample: Sample, answer: Outputs, target: int) -> Weights:
    from captum.attr import FeatureAblation

    return _by_groups(sample, answer, target, FeatureAblation)


def _lime(sample: Sample, answer: Outputs, target: int) -> Weights:
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime

    # Captum's own choice, a lasso, makes all weights zero where outputs are small.
    kind = partial(Lime, interpretable_model=SkLearnRidge(alpha=0.01))
    return _by_groups(sample, answer, target, kind, n_samples=_draws(sample))


def _kernel_shap(sample: Sample, answer: Outputs, target: int) -> Weights:
    from captum.attr import KernelShap

    return _by_groups(sample, answer, target, KernelShap, n_samples=_draws(sample))


BY_NAME: dict[str, Callable[[Sample, Outputs, int], Weights]] = dict(
    zip(METHODS, (_integrated_gradients, _occlusion, _kernel_shap, _lime), strict=True)
)


def _draws(sample: Sample) -> int:
    return min(DRAWS, 64 + 32 * (int(sample.groups.max()) + 1))


def _by_groups(sample: Sample, answer: Outputs, target: int, kind: Any, **options: int) -> Weights:
    """What captum says of the groups, spread evenly over the parts of each."""
    sizes = torch.bincount(sample.groups)
    groups = len(sizes)
    asked = 0

    @torch.no_grad()
    def function(z: Tensor) -> Tensor:
        nonlocal asked
        asked += len(z)
        return answer(sample.rough(z[:, sample.groups]))[:, target]

    full, empty = _ends(lambda z: answer(sample.rough(z))[:, target], sample)
    if groups == 1:  # of which the regressions find no weight
        spread = ((full - empty) / sizes)[sample.groups]
        return Weights(values=spread, full=full, empty=empty, evaluations=2)
    there, none = torch.ones(1, groups), torch.zeros(1, groups)
    with torch.random.fork_rng(devices=[]):  # the same question has the same answer
        torch.manual_seed(0)
        values = kind(function).attribute(
            there, baselines=none, perturbations_per_eval=AT_A_TIME, **options
        )
    spread = (values[0].float() / sizes)[sample.groups]
    return Weights(values=spread, full=full, empty=empty, evaluations=asked)


def _ends(function: Callable[[Tensor], Tensor], sample: Sample) -> tuple[float, float]:
    """
    Raises:
        OverflowError: when one of them is not finite.
    """
    with torch.no_grad():
        both = function(torch.stack([torch.ones(sample.parts), torch.zeros(sample.parts)]))
    if not both.isfinite().all():
        raise OverflowError("the answer is not finite")
    full, empty = both.tolist()
    return full, empty
