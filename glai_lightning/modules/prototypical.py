"""PrototypicalModule: few-shot classification by the distance to class prototypes."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice, expect_number
from glai_lightning.modules.head_module import OptimizerFactory, SchedulerFactory
from glai_lightning.modules.prototypes import (
    DISTANCES,
    Distance,
    check_labels,
    class_prototypes,
    positions_of,
    prototype_logits,
)
from glai_lightning.modules.scored import ScoredModule

_KEYS = ("support", "support_labels", "query", "query_labels")


class ConfidenceHalfWidth(Metric):
    """Half the width of the 95 % interval of a mean over episodes, as few-shot results state it: 1.96 s / sqrt(n).

    s is the standard deviation over the n episodes (of n - 1 degrees of freedom), and NaN for a single one.

    Example:
        >>> interval = ConfidenceHalfWidth()
        >>> for accuracy in (0.5, 0.7):
        ...     interval.update(torch.tensor(accuracy))
        >>> round(float(interval.compute()), 3)
        0.196
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, value: Tensor) -> None:
        """Take the value of an episode, 0-d."""
        self.values.append(value.detach().reshape(1))

    def compute(self) -> Tensor:
        """Return the half width, 0-d."""
        values = dim_zero_cat(self.values)
        return 1.96 * (values.var() / len(values)).sqrt() if len(values) > 1 else torch.full_like(values[0], torch.nan)


class PrototypicalModule(ScoredModule):
    """Trains a head so that queries lie near the prototype of their class (Snell et al. 2017).

    A batch is one episode: a dict of ``support`` (n, ...), ``support_labels`` (n,), ``query`` (m, ...) and
    ``query_labels`` (m,). Labels may be any integers; they mean something within their episode only. Backbone and head
    see support and query together in one forward. The loss is the cross-entropy of the queries.

    It logs ``train/loss``, ``train/accuracy``, ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy``,
    means over the episodes of an epoch, and ``test/accuracy_interval``: the 95 % interval of the accuracy is
    ``test/accuracy`` plus or minus that. The field states it over 600 test episodes or more.

    Args:
        head: any module from backbone embeddings (batch, D) to the embeddings (batch, C) that distances are taken in.
        backbone: any module from a batch of inputs to embeddings, see ``HeadModule``.
        distance: 'squared_euclidean', or 'cosine' for scaled cosine similarities.
        cosine_scale: what cosine similarities are multiplied by, above 0.
        freeze_backbone: see ``HeadModule``.
        optimizer: see ``HeadModule``.
        lr_scheduler: see ``HeadModule``.
        standardise_embeddings: see ``HeadModule``.

    Raises:
        ValueError: if ``distance`` is neither, or ``cosine_scale`` is not above 0; from a step, if the support lacks a
            class of the query, or the parts of an episode do not fit each other.
        TypeError: if ``cosine_scale`` is not a number; from a step, if a batch is no such dict, or labels are not
            integers.

    Example:
        >>> from glai_lightning import PrototypicalModule, mlp_head
        >>> module = PrototypicalModule(mlp_head(4, 8, 16))
        >>> episode = {"support": torch.randn(6, 4), "support_labels": torch.tensor([3, 3, 9, 9, 5, 5])}
        >>> module.episode_logits(episode | {"query": torch.randn(7, 4)})[0].shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        head: nn.Module,
        backbone: nn.Module | None = None,
        *,
        distance: Distance = "squared_euclidean",
        cosine_scale: float = 10.0,
        freeze_backbone: bool = True,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        standardise_embeddings: bool = True,
    ) -> None:
        super().__init__(
            head,
            backbone,
            freeze_backbone=freeze_backbone,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            standardise_embeddings=standardise_embeddings,
        )
        expect_choice("distance", distance, DISTANCES)
        expect_number("cosine_scale", cosine_scale, low=0.0, above=True)
        self.distance: Distance = distance
        self.cosine_scale = cosine_scale
        self._set_metrics(
            lambda stage: {
                "accuracy": MeanMetric(),
                **({"accuracy_interval": ConfidenceHalfWidth()} if stage == "test" else {}),
            }
        )

    def episode_logits(self, episode: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compare the queries of an episode with its prototypes; query labels are not needed.

        Args:
            episode: ``support`` (n, ...), ``support_labels`` (n,) and ``query`` (m, ...).

        Returns:
            Logits (m, ways), and the label of each column (ways,), ascending.
        """
        support, query = episode["support"], episode["query"]
        if support.shape[1:] != query.shape[1:]:
            raise UserValueError(
                "Expected samples of one shape in `support` and `query`, "
                f"but got {tuple(support.shape[1:])} and {tuple(query.shape[1:])}."
            )
        embeddings = self(torch.cat([support, query]))
        prototypes, classes = class_prototypes(embeddings[: len(support)], episode["support_labels"])
        logits = prototype_logits(
            embeddings[len(support) :], prototypes, distance=self.distance, cosine_scale=self.cosine_scale
        )
        return logits, classes

    def measure(self, batch: Any) -> dict[str, tuple[Any, ...]]:
        """Return what an episode tells the metrics."""
        _check_episode(batch, _KEYS)
        check_labels("query_labels", batch["query_labels"], len(batch["query"]))
        logits, classes = self.episode_logits(batch)
        targets = positions_of(batch["query_labels"], classes)
        accuracy = (logits.argmax(1) == targets).float().mean()
        loss = F.cross_entropy(logits, targets)
        return {"loss": (loss,), "accuracy": (accuracy,), "accuracy_interval": (accuracy,)}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits (queries, ways) of an episode; columns in ascending order of the support's labels."""
        _check_episode(batch, _KEYS[:3])
        return self.episode_logits(batch)[0]


def _check_episode(batch: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(batch, Mapping):
        raise UserTypeError(
            f"Expected a batch to be an episode, a dict of {', '.join(map(repr, _KEYS))}, "
            f"but got `{type(batch).__name__}`."
        )
    missing = [key for key in keys if key not in batch]
    if missing:
        raise UserTypeError(f"Expected an episode to hold {', '.join(map(repr, keys))}, but it lacks {missing}.")
    for key in ("support", "query"):
        if not isinstance(batch[key], Tensor) or not len(batch[key]):
            raise UserTypeError(
                f"Expected `{key}` to be a tensor of at least one sample, but got {_described(batch[key])}."
            )


def _described(value: object) -> str:
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"`{type(value).__name__}`"
