"""Accuracy of a nearest-neighbour classifier: how well features tell classes apart without any training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from glai_lightning.checks import UserValueError
from glai_lightning.optional import import_optional

#: Temperature of the votes, as in Wu et al. (2018), arXiv 1805.01978.
_VOTE_TEMPERATURE = 0.1


class NearestNeighbourAccuracy(Metric):
    """Leave-one-out accuracy of the k-nearest-neighbour classifier of Wu et al. (2018), arXiv 1805.01978.

    Every sample is classified by the k others that are nearest by cosine similarity s, with votes of weight
    exp(s / 0.1). All samples that the metric was updated with, over all processes, are kept until it is computed; the
    computation takes N^2 D multiply-adds on the CPU (scikit-learn).

    Args:
        neighbors: k, at least 1; all others, where there are no more than k.

    Raises:
        ValueError: from ``compute``, if there are fewer than two samples, or features that are not finite.

    Example:
        >>> accuracy = NearestNeighbourAccuracy(neighbors=1)
        >>> accuracy.update(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]]), torch.tensor([0, 0, 1, 1]))
        >>> accuracy.compute()
        tensor(1.)
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    features: list[Tensor]
    labels: list[Tensor]

    def __init__(self, neighbors: int = 20, **options: Any) -> None:
        super().__init__(**options)
        self.neighbors = neighbors
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features (batch, ...) and classes (batch,)."""
        self.features.append(features.detach().flatten(1).float())
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the fraction of samples that the others classify right, a 0-d float tensor in [0, 1]."""
        # One tensor each once they were gathered from several processes.
        features, labels = (
            torch.cat(state) if isinstance(state, list) else state for state in (self.features, self.labels)
        )
        if len(features) < 2:
            raise UserValueError(f"Expected at least two samples for nearest neighbours, but got {len(features)}.")
        if not features.isfinite().all():
            raise UserValueError("Expected finite features for nearest neighbours, but got NaN or infinite ones.")
        # It takes a second to import, and only this metric needs it.
        sklearn: Any = import_optional("sklearn.neighbors", needed_for="`knn_neighbors`", extra="ssl")
        neighbors = min(self.neighbors, len(features) - 1)
        classifier = sklearn.KNeighborsClassifier(neighbors, metric="cosine", weights=_votes, algorithm="brute")
        classes = labels.cpu().numpy()
        # Without samples to classify, scikit-learn classifies those it knows, none of them its own neighbour.
        predicted = classifier.fit(features.cpu().numpy(), classes).predict(None)
        return torch.tensor(float(np.mean(predicted == classes)), device=self.device)


def _votes(distances: np.ndarray) -> np.ndarray:
    return np.exp((1 - distances) / _VOTE_TEMPERATURE)
