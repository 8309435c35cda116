"""Small convolutional backbones for images of a few dozen pixels."""

from torch import Tensor, nn

from glai_lightning.checks import expect_sizes


class WithChannel(nn.Module):
    """Gives images (batch, height, width) the one channel that they are of, and leaves others alone."""

    def forward(self, images: Tensor) -> Tensor:
        """Return images (batch, channels, height, width)."""
        return images.unsqueeze(1) if images.ndim == 3 else images


def conv_backbone(in_channels: int = 1, channels: int = 64, blocks: int = 4) -> nn.Sequential:
    """Make the stack of convolutions that few-shot papers compare on, known as Conv-4 (Vinyals et al. 2016).

    Each block is a 3x3 convolution, BatchNorm, ReLU and 2x2 max pooling, so that it halves height and width.

    Args:
        in_channels: channels of the images.
        channels: channels of every block.
        blocks: number of blocks; images need at least 2 ** blocks pixels a side.

    Returns:
        A module from images (batch, in_channels, height, width), or (batch, height, width) of one channel, to
        embeddings (batch, channels * (height // 2 ** blocks) * (width // 2 ** blocks)).

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1.

    Example:
        >>> import torch
        >>> conv_backbone(channels=32)(torch.zeros(2, 28, 28)).shape
        torch.Size([2, 32])
    """
    expect_sizes(in_channels=in_channels, channels=channels, blocks=blocks)
    layers: list[nn.Module] = [WithChannel()]
    for block in range(blocks):
        layers += [
            nn.Conv2d(channels if block else in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten())
