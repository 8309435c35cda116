"""Classification by the nearest class prototype, the mean of a class's support embeddings (Snell et al. 2017)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from glai_lightning.checks import UserTypeError, UserValueError

Distance = Literal["squared_euclidean", "cosine"]
DISTANCES: tuple[str, ...] = get_args(Distance)

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def class_prototypes(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean embedding of each class (Snell et al. 2017, equation 1).

    Args:
        embeddings: support embeddings (samples, D), of a floating dtype.
        labels: their labels (samples,), any integers.

    Returns:
        Prototypes (ways, D), float32 or wider, and the label of each (ways,), int64, in ascending order.

    Raises:
        TypeError: if labels are not integers.
        ValueError: if there are not as many labels as embeddings, or fewer than two classes.

    Example:
        >>> class_prototypes(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([7, 7, -2]))
        (tensor([[0., 5.],
                [2., 0.]]), tensor([-2,  7]))
    """
    check_labels("support_labels", labels, len(embeddings))
    classes, positions = torch.unique(labels.long(), return_inverse=True)
    if len(classes) < 2:
        raise UserValueError(f"Expected `support_labels` to hold at least 2 classes, but got {classes.tolist()}.")
    embeddings = _in_full_precision(embeddings)
    # A product with one-hot rows, and not index_add, which is not deterministic on GPUs.
    members = F.one_hot(positions, len(classes)).to(embeddings.dtype).T
    with torch.autocast(embeddings.device.type, enabled=False):
        return members @ embeddings / members.sum(1, keepdim=True), classes


def prototype_logits(
    embeddings: Tensor, prototypes: Tensor, *, distance: Distance = "squared_euclidean", cosine_scale: float = 10.0
) -> Tensor:
    """Return how near embeddings are to prototypes.

    Args:
        embeddings: query embeddings (queries, D), of a floating dtype.
        prototypes: (ways, D), as ``class_prototypes`` gives them.
        distance: 'squared_euclidean' for minus the squared distance (Snell et al. 2017, equation 2), 'cosine' for
            ``cosine_scale`` times the cosine similarity.
        cosine_scale: inverse temperature of cosine similarities, which lie in [-1, 1].

    Returns:
        Logits (queries, ways), float32 or wider.

    Example:
        >>> prototype_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([[-4., -8.]])
    """
    embeddings = _in_full_precision(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        if distance == "cosine":
            return cosine_scale * F.normalize(embeddings, dim=1) @ F.normalize(prototypes, dim=1).T
        # Distances do not change under a shift; without it the squares would cancel where embeddings are far from zero.
        centre = prototypes.detach().mean(0)
        embeddings, prototypes = embeddings - centre, prototypes - centre
        squares = embeddings.square().sum(1, keepdim=True) + prototypes.square().sum(1)
        return 2 * embeddings @ prototypes.T - squares


def positions_of(labels: Tensor, classes: Tensor) -> Tensor:
    """Return the column that each query's label has in the logits.

    Args:
        labels: query labels (queries,), any integers.
        classes: labels of the prototypes (ways,), ascending.

    Returns:
        Positions (queries,), int64, in [0, ways).

    Raises:
        ValueError: if a label has no prototype.
    """
    labels = labels.long()
    positions = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    known = classes[positions] == labels
    if not known.all():
        missing = torch.unique(labels[~known]).tolist()
        raise UserValueError(f"Expected `support_labels` to hold every class of the query, but it lacks {missing}.")
    return positions


def check_labels(name: str, labels: Tensor, samples: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless labels are integers, one for each sample."""
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise UserTypeError(f"Expected `{name}` to be a tensor of integers, but got {got}.")
    if labels.shape != (samples,):
        raise UserValueError(
            f"Expected `{name}` to hold a label for each of {samples} samples, but got the shape {tuple(labels.shape)}."
        )


def _in_full_precision(embeddings: Tensor) -> Tensor:
    # Distances in half precision would not tell near classes apart.
    return embeddings if embeddings.dtype in (torch.float32, torch.float64) else embeddings.float()
