"""Minibatch steps of Adam on a linear model, whose weights are averaged: a cheap solve where there are many classes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError
from glai_lightning.solvers.cross_entropy import LogisticObjective, check_batch, linear_logits
from glai_lightning.solvers.feature_batches import FeatureBatches, SystematicSample

#: Rows of the sample on which loss and gradient are reported.
_SAMPLED_ROWS = 4096


class AveragedAdam:
    """Averages the weights over minibatch steps of Adam at a constant rate, in which their noise cancels.

    Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992. The average begins anew after
    the first pass, which leads from the start to where the steps wander.

    Rows of a tensor are drawn in a new order in every pass, those of other batches come as they are read. A step is
    made on one minibatch of every process, whose gradients are added up, so that the weights are the same in all.

    Args:
        objective: what is minimised, and from where on; its batches are checked in the first pass. The mean of a
            minibatch weighs samples as that of all does.
        learning_rate: step size of Adam.
        batch_size: rows of a minibatch.
    """

    def __init__(self, objective: LogisticObjective, *, learning_rate: float, batch_size: int) -> None:
        self.objective = objective
        self.passes = self.steps = 0
        start = objective.start
        self._batch_size = batch_size
        self._weights = start.clone()
        self._average, self._averaged = torch.zeros_like(start), 0
        self._adam = torch.optim.Adam([self._weights], lr=learning_rate, fused=start.device.type in ("cpu", "cuda"))
        self._order = torch.Generator().manual_seed(0)
        self._sample = SystematicSample(_SAMPLED_ROWS, objective.batches.samples)
        self._nothing = (
            start.new_empty(0, start.shape[1] - objective.has_bias),
            torch.empty(0, dtype=torch.int64).to(start.device),
        )
        self._sample.add(*self._nothing)

    def make_pass(self) -> Tensor:
        """Make one pass over the data, and return the average of the weights over its steps and those before.

        Raises:
            TypeError: if features or labels have the wrong dtype.
            ValueError: if there is no sample, or shapes, labels or numbers are not what they have to be.
        """
        if self.passes <= 1:
            self._averaged = 0
        before = self.steps
        for features, labels in self._minibatches():
            self._step(features, labels)
            self.steps += 1
            self._averaged += 1
            self._average.lerp_(self._weights, 1.0 / self._averaged)
        if self.steps == before:
            raise UserValueError("Expected at least one sample, but got none.")
        self.passes += 1
        if not bool(self._average.isfinite().all()):
            raise UserValueError("Expected a finite loss, but the logits overflow: scale the features or weights.")
        return self._average.clone()

    def sampled_objective(self) -> LogisticObjective:
        """Return what is minimised, of a sample of what was read in the first pass, spread evenly over it."""
        return self.objective.over(FeatureBatches(*self._sample.collect()))

    def _step(self, features: Tensor, labels: Tensor) -> None:
        logits = linear_logits(self._weights, features, has_bias=self.objective.has_bias)
        weight = self.objective.cross_entropy.class_weights[labels].sum()
        if self.objective.center == "current":
            change = logits - linear_logits(self.objective.start, features, has_bias=self.objective.has_bias)
        _, by_logits = self.objective.cross_entropy.evaluate(logits, labels)
        if self.objective.center == "current" and len(labels):
            by_logits.add_(change, alpha=self.objective.l2 * float(weight) / len(labels))
        # The last column is the weight of the samples, so that one sum over processes adds up both.
        summed = features.new_empty(len(self.objective.start), self.objective.start.shape[1] + 1)
        torch.mm(by_logits, features, out=summed[:, : features.shape[1]])
        if self.objective.has_bias:
            summed[:, -2] = by_logits.sum(1)
        summed[:, -1] = weight
        self.objective.processes.sum(summed)
        # Samples of weight 0 alone have no gradient either.
        gradient = summed[:, :-1] / summed[0, -1].clamp(min=torch.finfo(summed.dtype).tiny)
        if self.objective.center == "zero":
            gradient[:, : features.shape[1]].add_(self._weights[:, : features.shape[1]], alpha=self.objective.l2)
        self._weights.grad = gradient
        self._adam.step()

    def _minibatches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what this process has to offer for every step, empty once it has read all it has.

        Where one process raises an error, all do, and all stop together.
        """
        own = self._shuffled() if self.objective.batches.in_memory else self._cut()
        while True:
            with self.objective.processes.failing_together():
                features, labels = next(own, self._nothing)
            (rows,) = self.objective.processes.sum_numbers(len(features))
            if rows == 0:
                return
            yield features, labels

    def _shuffled(self) -> Iterator[tuple[Tensor, Tensor]]:
        features, targets = self.objective.batches.features, self.objective.batches.targets
        assert isinstance(features, Tensor)
        assert targets is not None
        if self.passes == 0:
            for batch in self.objective.batches:
                self._check_and_sample(*batch)
        for rows in torch.split(torch.randperm(len(features), generator=self._order), self._batch_size):
            yield features[rows].to(self.objective.start), self._labels(targets[rows])

    def _cut(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in self.objective.batches:
            if self.passes == 0:
                self._check_and_sample(features, targets)
            pairs = zip(torch.split(features, self._batch_size), torch.split(targets, self._batch_size), strict=True)
            for some_features, some_targets in pairs:
                yield some_features.to(self.objective.start), self._labels(some_targets)

    def _labels(self, targets: Tensor) -> Tensor:
        return targets.reshape(-1).to(self.objective.start.device, torch.int64)

    def _check_and_sample(self, features: Tensor, targets: Tensor) -> None:
        width = self.objective.start.shape[1] - self.objective.has_bias
        check_batch(features, targets, num_features=width, num_logits=len(self.objective.start))
        if not bool(features.isfinite().all()):
            raise UserValueError("Expected features to be finite, but got NaN or infinity.")
        self._sample.add(features.to(self.objective.start), self._labels(targets))
