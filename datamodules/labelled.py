"""What data modules of samples with a class each have in common."""

from collections.abc import Mapping

from glai_lightning.datamodules.loader import Batches
from glai_lightning.datamodules.split_loading import SplitDataModule


class LabelledDataModule(SplitDataModule):
    """Batches ``(inputs, labels)`` of what a subclass reads in ``_read``; labels (batch,) int64.

    The arguments are those of ``SplitDataModule``.
    """

    _content: tuple[Mapping[str, Batches], list[str]] | None = None

    def _read(self) -> tuple[Mapping[str, Batches], list[str]]:
        """Return the samples of ``train``, ``val`` and, where there are some, ``test``; and the classes by name."""
        raise NotImplementedError

    @property
    def splits(self) -> Mapping[str, Batches]:
        """The samples of ``train`` and ``val``, and of ``test`` where there are some, in the order of the data."""
        if self._content is None:
            self._content = self._read()
        return self._content[0]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in sorted order: the labels number them."""
        self.setup()
        assert self._content is not None
        return self._content[1]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)
