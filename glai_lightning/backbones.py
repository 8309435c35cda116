"""Backbones: models of other libraries by name, with their preprocessing, and a small convolutional one."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserValueError, expect_choice, expect_file, expect_integer
from glai_lightning.optional import check_known, import_optional

__all__ = [
    "SentenceTransformersBackbone",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransformersBackbone",
    "conv_backbone",
]

Texts = Sequence[str] | Mapping[str, Tensor]


class TimmBackbone(nn.Module):
    """A model of timm without its classifier, behind the resizing, cropping and normalisation of its data config.

    Args:
        name: name of the model, one of ``timm.list_models()``, with or without a tag of its weights.
        pretrained: whether to load weights from the hub, or from the cache of an earlier download.
        weights: a local file of weights (a state dict, .safetensors or for ``torch.load``) instead; a classifier in it
            is left out.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if there is no such model or file, both kinds of weights are asked for, or they do not fit.

    Example:
        >>> TimmBackbone("test_resnet")(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 96])
    """

    def __init__(self, name: str, pretrained: bool = False, weights: str | PathLike[str] | None = None) -> None:
        super().__init__()
        timm: Any = import_optional("timm", needed_for="`TimmBackbone`", extra="vision")
        _check_one_source(pretrained, weights)
        check_known(name.split(".")[0], timm.list_models(), library="timm")
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        if weights is not None:
            classifier = model.default_cfg.get("classifier", ())
            _load_weights(model, weights, classifier=(classifier,) if isinstance(classifier, str) else classifier)
        self.model = model
        self.num_features: int = model.num_features
        config = timm.data.resolve_model_data_config(model)
        self._size: tuple[int, int] = tuple(config["input_size"][-2:])
        self._resize_to = [int(side / config["crop_pct"]) for side in self._size]
        self._interpolation: str = config["interpolation"]
        self._mean, self._std = list(config["mean"]), list(config["std"])

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (batch, 3, height, width), uint8 or floating point in [0, 1] -> (batch, D)."""
        return self.model(self.preprocess(images))  # type: ignore[no-any-return]

    def preprocess(self, images: Tensor) -> Tensor:
        """Return images as the model is to be given them: resized, cropped at the centre, normalised."""
        transforms: Any = import_optional(
            "torchvision.transforms.functional", needed_for="`TimmBackbone`", extra="vision"
        )
        scaled = images / 255 if images.dtype is torch.uint8 else images
        if tuple(scaled.shape[-2:]) != self._size:
            mode = getattr(transforms.InterpolationMode, self._interpolation.upper())
            # The shorter side to the size before the crop, as in timm's evaluation transform.
            scaled = transforms.resize(scaled, min(self._resize_to), interpolation=mode, antialias=True)
            scaled = transforms.center_crop(scaled, list(self._size))
        return transforms.normalize(scaled, self._mean, self._std)  # type: ignore[no-any-return]


class TorchvisionBackbone(nn.Module):
    """A classification model of torchvision without its classifier, behind the transforms of its weights.

    Args:
        name: name of the model, such as ``resnet18``, one of ``torchvision.models.list_models()``.
        pretrained: whether to load torchvision's default weights, from the net or the cache of an earlier download.
        weights: a local file of weights (a state dict for ``torch.load``) instead; a classifier in it is left out.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
        ValueError: if there is no such model or file, both kinds of weights are asked for, or they do not fit.

    Example:
        >>> TorchvisionBackbone("mobilenet_v3_small").num_features
        1024
    """

    def __init__(self, name: str, pretrained: bool = False, weights: str | PathLike[str] | None = None) -> None:
        super().__init__()
        models: Any = import_optional("torchvision.models", needed_for="`TorchvisionBackbone`", extra="vision")
        _check_one_source(pretrained, weights)
        check_known(name, models.list_models(module=models), library="torchvision")
        default = models.get_model_weights(name).DEFAULT
        model = models.get_model(name, weights=default if pretrained else None)
        classifier = [child for child, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        self.num_features: int = model.get_submodule(classifier).in_features
        model.set_submodule(classifier, nn.Identity())
        if weights is not None:
            _load_weights(model, weights, classifier=(classifier,))
        self.model = model
        self._transform = default.transforms()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (batch, 3, height, width), uint8 or floating point in [0, 1] -> (batch, D)."""
        return self.model(self.preprocess(images))  # type: ignore[no-any-return]

    def preprocess(self, images: Tensor) -> Tensor:
        """Return images as the model is to be given them: resized, cropped at the centre, normalised."""
        return self._transform(images)  # type: ignore[no-any-return]


class TransformersBackbone(nn.Module):
    """A text encoder of transformers with its tokenizer, pooled over the tokens.

    Args:
        name: name on the hub, or a local folder, that holds model and tokenizer. Code in it is not run, and weights
            are read from safetensors only.
        pooling: 'mean' over the tokens that are not padding, or the first token, 'cls'.
        max_length: tokens beyond which a text is cut; ``None`` for what the tokenizer says.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: if ``pooling`` is unknown.
    """

    def __init__(self, name: str, pooling: Literal["mean", "cls"] = "mean", max_length: int | None = None) -> None:
        super().__init__()
        expect_choice("pooling", pooling, ("mean", "cls"))
        transformers: Any = import_optional("transformers", needed_for="`TransformersBackbone`", extra="text")
        self.model = transformers.AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.pooling = pooling
        limit = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_length = min(self.tokenizer.model_max_length, limit) if max_length is None else max_length
        self.num_features: int = self.model.config.hidden_size

    def forward(self, texts: Texts) -> Tensor:
        """Embed texts, a list of strings or what the tokenizer makes of it -> (batch, D)."""
        tokens = _tokens(texts, self.tokenize, self.model.device)
        hidden: Tensor = self.model(**tokens).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        mask: Tensor = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def tokenize(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return tensors (batch, tokens) by name, padded to the longest text."""
        return self.tokenizer(  # type: ignore[no-any-return]
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )


class SentenceTransformersBackbone(nn.Module):
    """A model of sentence-transformers, with its own tokenizer, pooling and normalisation.

    Args:
        name: name on the hub, or a local folder. Code in it is not run, and weights are read from safetensors only.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if sentence-transformers is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        library: Any = import_optional(
            "sentence_transformers", needed_for="`SentenceTransformersBackbone`", extra="text"
        )
        self.model = library.SentenceTransformer(
            name, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
        self.num_features: int = self.model.get_sentence_embedding_dimension()

    def forward(self, texts: Texts) -> Tensor:
        """Embed texts, a list of strings or what ``tokenize`` makes of it -> (batch, D)."""
        tokens = _tokens(texts, self.tokenize, self.model.device)
        return self.model(dict(tokens))["sentence_embedding"]  # type: ignore[no-any-return]

    def tokenize(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return tensors (batch, tokens) by name, padded to the longest text."""
        return self.model.tokenize(list(texts))  # type: ignore[no-any-return]


class _WithChannel(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
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
        >>> conv_backbone(channels=32)(torch.zeros(2, 28, 28)).shape
        torch.Size([2, 32])
    """
    for name, value in {"in_channels": in_channels, "channels": channels, "blocks": blocks}.items():
        expect_integer(name, value, least=1)
    layers: list[nn.Module] = [_WithChannel()]
    for block in range(blocks):
        layers += [
            nn.Conv2d(channels if block else in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten())


def _check_one_source(pretrained: bool, weights: str | PathLike[str] | None) -> None:
    if pretrained and weights is not None:
        raise UserValueError(
            "Expected `weights` to be None with `pretrained`, which loads other weights, but got both."
        )


def _load_weights(model: nn.Module, path: str | PathLike[str], *, classifier: Sequence[str]) -> None:
    path = expect_file("weights", path)
    if path.suffix == ".safetensors":
        entries = import_optional("safetensors.torch", needed_for="`weights`", extra="vision").load_file(path)
    else:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    prefixes = tuple(f"{name}." for name in classifier)
    model.load_state_dict({key: value for key, value in entries.items() if not key.startswith(prefixes)})


def _tokens(texts: Texts, tokenize: Any, device: torch.device) -> dict[str, Any]:
    tokens = texts if isinstance(texts, Mapping) else tokenize(texts)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tokens.items()}
