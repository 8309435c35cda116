"""A linear classifier that is trained beside a fit, on features that it sends no gradient back into."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OnlineProbe(nn.Module):
    """Softmax regression on features, one step of gradient descent with momentum for every batch it is shown.

    It stands outside of the fit that it watches: its weights require no gradient, so that no optimizer holds them and
    neither gradient clipping nor DistributedDataParallel counts them, it starts at zero and draws no random number, and
    its gradient is the closed form of the softmax regression. A state dict holds its weights and its momentum.

    Features are divided by their norm, which bounds the curvature of the loss by 1 whatever their scale, so that one
    rate suits all of them.

    Args:
        in_features: width D of the features.
        num_classes: number K of classes.
        lr: learning rate; below 3.8 for a momentum of 0.9, where the descent would become unstable.
        momentum: momentum of the descent, in [0, 1).

    Example:
        >>> probe = OnlineProbe(2, 2)
        >>> features, labels = torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
        >>> probe.update(features, labels)
        >>> probe(features).argmax(1)
        tensor([0, 1])
    """

    def __init__(self, in_features: int, num_classes: int, *, lr: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__()
        # Parameters, not buffers: DDP broadcasts buffers at every forward. The last column is the bias.
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features + 1), requires_grad=False)
        self.velocity = nn.Parameter(torch.zeros(num_classes, in_features + 1), requires_grad=False)
        self.lr = lr
        self.momentum = momentum

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits: features (batch, ...) of D numbers each -> (batch, K)."""
        return self._directions(features) @ self.weight.T

    def _directions(self, features: Tensor) -> Tensor:
        directions = F.normalize(features.detach().flatten(1).to(self.weight.dtype), dim=1)
        return F.pad(directions, (0, 1), value=1.0)

    @torch.no_grad()
    def update(
        self, features: Tensor, labels: Tensor, average: Callable[[Tensor], Tensor] = lambda gradient: gradient
    ) -> None:
        """Take one step of gradient descent.

        Args:
            features: features (batch, ...) of D numbers each.
            labels: classes (batch,), integers in [0, K).
            average: averages a gradient over the processes of a fit.
        """
        directions = self._directions(features)
        num_classes = len(self.weight)
        errors = (directions @ self.weight.T).softmax(1) - F.one_hot(labels.long(), num_classes)
        gradient = average(errors.T @ directions / len(directions))
        self.velocity.mul_(self.momentum).add_(gradient)
        self.weight.sub_(self.velocity, alpha=self.lr)
