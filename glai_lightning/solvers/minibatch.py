"""Minibatch steps of Adam on a linear model, whose weights are averaged: a solve in little memory for many classes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from glai_lightning.solvers.objective import Batch, LinearModel, MeanLoss

#: Rows of a minibatch, in each process.
BATCH_SIZE = 256
#: Of features in units of their standard deviation.
_LEARNING_RATE = 5e-3


class AveragedAdam:
    """Averages the weights over the minibatch steps of a pass, in which their noise cancels.

    Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992, around steps of Adam at a constant
    rate. Features are shifted and scaled column by column, so that one rate suits all of them.

    Rows of a tensor are drawn in a new order in every pass, those of other batches come as they are read. A step is
    made on one minibatch of every process, whose gradients are added up, so that the weights are the same in all.

    Args:
        mean_loss: what is minimised, with a first pass made.
        features: a sample of the features of all processes, (S, F), for their means and deviations.
    """

    def __init__(self, mean_loss: MeanLoss, features: Tensor) -> None:
        self.model: LinearModel = mean_loss.model
        self._batches = mean_loss.batches
        self.steps = 0
        mean = features.mean(0) if self.model.has_bias else features.new_zeros(features.shape[1])
        scale = (features - mean).square().mean(0).sqrt()
        rounding = 8.0 * torch.finfo(features.dtype).eps * features.abs().amax(0)
        self._mean, self._scale = mean, torch.where(scale > rounding, scale, 1.0)
        # What a sample counts on average, as the mean loss counts it.
        self._weight = mean_loss.normaliser / mean_loss.samples
        self._weights = self._to_standard(self.model.start)
        self._adam = torch.optim.Adam(
            [self._weights], lr=_LEARNING_RATE, fused=self._weights.device.type in ("cpu", "cuda")
        )
        self._order = torch.Generator().manual_seed(0)

    def make_pass(self, l2: float) -> Tensor:
        """Make one pass over the data, and return the average of the weights (C, F or F + 1) over its steps.

        Args:
            l2: strength of the penalty on the weights of the features as given.
        """
        model, average, averaged = self.model, torch.zeros_like(self._weights), 0
        width, penalty = model.num_features, l2 / self._scale.square().clamp(min=1e-20)
        for features, targets, sample_weights in self._minibatches():
            _, by_logits = model.loss.evaluate(model.logits(self._weights, features), targets, sample_weights)
            # The last column is the number of rows, so that one sum over processes adds up both.
            summed = torch.zeros(len(self._weights), self._weights.shape[1] + 1).to(self._weights)
            model.add_gradient(summed[:, :-1], by_logits, features)
            summed[:, -1] = len(features)
            model.processes.sum(summed)
            gradient = summed[:, :-1] / (summed[0, -1] * self._weight)
            gradient[:, :width].addcmul_(self._weights[:, :width], penalty)
            self._weights.grad = gradient
            self._adam.step()
            self.steps, averaged = self.steps + 1, averaged + 1
            average.lerp_(self._weights, 1.0 / averaged)
        return self._from_standard(average)

    def _to_standard(self, weights: Tensor) -> Tensor:
        width = self.model.num_features
        standard = weights.clone()
        standard[:, :width] *= self._scale
        standard[:, width:] += (weights[:, :width] @ self._mean).unsqueeze(1)
        return standard

    def _from_standard(self, weights: Tensor) -> Tensor:
        width = self.model.num_features
        given = weights.clone()
        given[:, :width] /= self._scale
        given[:, width:] -= (given[:, :width] @ self._mean).unsqueeze(1)
        return given

    def _minibatches(self) -> Iterator[Batch]:
        """Yield what this process has to offer for every step, no rows once it has read all it has.

        Where one process raises an error, all do, and all stop together.
        """
        nothing = self._weights.new_zeros(0, self.model.num_features)
        # As probabilities or as outputs, whatever the loss.
        last: Batch = nothing, self.model.loss.read(nothing.new_zeros(0, len(self._weights)), nothing), None
        own = self._own()
        while True:
            with self.model.processes.failing_together():
                batch = next(own, None)
            (rows,) = self.model.processes.sum_numbers(0 if batch is None else len(batch[0]))
            if rows == 0:
                return
            last = _cut(last, slice(0)) if batch is None else batch
            yield last

    def _own(self) -> Iterator[Batch]:
        batches = self._batches
        if isinstance(batches.features, Tensor):
            order = torch.randperm(len(batches.features), generator=self._order)
            batches = batches.selected(order)
        for features, targets, weights in self.model.read(batches, checked=True):
            standard = (features - self._mean) / self._scale
            for start in range(0, len(features), BATCH_SIZE):
                yield _cut((standard, targets, weights), slice(start, start + BATCH_SIZE))


def _cut(batch: Batch, rows: slice) -> Batch:
    features, targets, weights = batch
    by_sample = targets[rows] if targets.ndim == 1 else targets[:, rows]
    return features[rows], by_sample, None if weights is None else weights[rows]
