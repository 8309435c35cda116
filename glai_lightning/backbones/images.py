"""Image models of timm and torchvision, with the preprocessing that their weights were trained with."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from glai_lightning.backbones.named import NamedBackbone, check_name, sentence_for_the_hub
from glai_lightning.checks import UserTypeError, UserValueError, expect_file
from glai_lightning.optional import check_known, import_optional

#: A batch (batch, 3, height, width), uint8 or floating point in [0, 1]; or a sequence of PIL images, of tensors
#: (3, height, width) or of arrays (height, width, 3), whose sizes may differ.
Images = Tensor | Sequence[Any]


class _ImageBackbone(NamedBackbone):
    """Preprocesses images, whatever their sizes, and embeds them."""

    name: str
    preprocessing: dict[str, Any]

    def __init__(self, name: str, pretrained: bool = True, weights: str | PathLike[str] | None = None) -> None:
        super().__init__()
        check_name(name)
        if not isinstance(pretrained, bool):
            raise UserTypeError(f"Expected `pretrained` to be True or False, but got {pretrained!r}.")
        file = None if weights is None else expect_file("weights", weights)
        self._make(name, pretrained=pretrained and file is None)
        if file is not None:
            _load_weights(self.model, file, classifier=self._classifier())
        elif not pretrained:
            rank_zero_warn(
                f"The weights of `{type(self).__name__}({name!r})` are random, because of `pretrained=False`: its "
                "embeddings say little about the images. Leave `pretrained` at True, or give a file of `weights`."
            )

    def _make(self, name: str, preprocessing: Mapping[str, Any] | None = None, pretrained: bool = False) -> None:  # type: ignore[override]
        raise NotImplementedError

    def _classifier(self) -> Sequence[str]:
        """Return the names of the layers that were left out of the model."""
        raise NotImplementedError

    def _prepare(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _resized(self, images: Tensor) -> Tensor:
        transforms = _torchvision("transforms.functional", f"`{type(self).__name__}`")
        mode = transforms.InterpolationMode(self.preprocessing["interpolation"])
        resized = transforms.resize(images, self.preprocessing["resize"], interpolation=mode, antialias=True)
        cropped: Tensor = transforms.center_crop(resized, self.preprocessing["size"])
        return cropped

    def _normalised(self, images: Tensor) -> Tensor:
        # torchvision's own looks at numbers, and cannot be exported for that.
        mean, std = (
            torch.tensor(self.preprocessing[name], dtype=images.dtype, device=images.device).view(-1, 1, 1)
            for name in ("mean", "std")
        )
        return (images - mean) / std

    def description(self) -> dict[str, Any]:
        """Return name and preprocessing, in primitives."""
        return {"name": self.name, "preprocessing": self.preprocessing}

    def forward(self, images: Images) -> Tensor:
        """Embed images -> (batch, D)."""
        embeddings: Tensor = self.model(self.preprocess(images))
        return embeddings

    def preprocess(self, images: Images) -> Tensor:
        """Return images as the model is to be given them: resized, cropped at the centre, normalised; one batch."""
        if isinstance(images, Tensor) and images.ndim == 4:
            return self._prepare(images)
        device = next(self.parameters()).device
        return torch.cat([self._prepare(_as_tensor(image).to(device)[None]) for image in images])


class TimmBackbone(_ImageBackbone):
    """A model of timm without its classifier, after the resizing, cropping and normalisation of its data config.

    Args:
        name: name of the model, one of ``timm.list_models()``, with or without a tag of its weights.
        pretrained: whether to load weights from the hub, or from the cache of an earlier download. Without them the
            weights are random, and a warning says so.
        weights: a local file of weights (a state dict, .safetensors or for ``torch.load``) instead; a classifier in it
            is left out.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        TypeError: if ``name`` is not a string, or ``pretrained`` not a bool.
        ValueError: if there is no such model or file, or the weights cannot be loaded or do not fit.

    Example:
        >>> backbone = TimmBackbone("test_resnet", pretrained=False)
        >>> backbone(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 96])
    """

    def _make(self, name: str, preprocessing: Mapping[str, Any] | None = None, pretrained: bool = False) -> None:  # type: ignore[override]
        timm: Any = import_optional("timm", needed_for="`TimmBackbone`", extra="vision")
        check_known(name.split(".")[0], timm.list_models(), library="timm")
        with sentence_for_the_hub(name):
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        self.name = name
        self.num_features = self.model.num_features
        if preprocessing is None:
            config = timm.data.resolve_model_data_config(self.model)
            size = [int(side) for side in config["input_size"][-2:]]
            preprocessing = {
                "size": size,
                # The shorter side to the size before the crop, as in timm's evaluation transform.
                "resize": min(int(side / config["crop_pct"]) for side in size),
                "interpolation": config["interpolation"],
                "mean": list(config["mean"]),
                "std": list(config["std"]),
            }
        self.preprocessing = dict(preprocessing)

    def _classifier(self) -> Sequence[str]:
        classifier = self.model.default_cfg.get("classifier", ())
        return (classifier,) if isinstance(classifier, str) else classifier

    def _prepare(self, images: Tensor) -> Tensor:
        scaled = images / 255 if images.dtype is torch.uint8 else images
        resized = scaled if list(scaled.shape[-2:]) == self.preprocessing["size"] else self._resized(scaled)
        return self._normalised(resized)


class TorchvisionBackbone(_ImageBackbone):
    """A classification model of torchvision without its classifier, after the transforms of its weights.

    Args:
        name: name of the model, such as ``resnet18``, one of ``torchvision.models.list_models()``.
        pretrained: whether to load torchvision's default weights, from the net or the cache of an earlier download.
            Without them the weights are random, and a warning says so.
        weights: a local file of weights (a state dict for ``torch.load``) instead; a classifier in it is left out.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
        TypeError: if ``name`` is not a string, or ``pretrained`` not a bool.
        ValueError: if there is no such model or file, or the weights cannot be loaded or do not fit.

    Example:
        >>> TorchvisionBackbone("mobilenet_v3_small", pretrained=False).num_features
        1024
    """

    def _make(self, name: str, preprocessing: Mapping[str, Any] | None = None, pretrained: bool = False) -> None:  # type: ignore[override]
        models = _torchvision("models", "`TorchvisionBackbone`")
        check_known(name, models.list_models(module=models), library="torchvision")
        default = models.get_model_weights(name).DEFAULT
        with sentence_for_the_hub(name):
            model = models.get_model(name, weights=default if pretrained else None)
        self._left_out = [child for child, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        self.num_features = model.get_submodule(self._left_out).in_features
        model.set_submodule(self._left_out, nn.Identity())
        self.model = model
        self.name = name
        if preprocessing is None:
            transform = default.transforms()
            preprocessing = {
                "size": list(transform.crop_size * 2)[:2],
                "resize": transform.resize_size[0],
                "interpolation": transform.interpolation.value,
                "mean": list(transform.mean),
                "std": list(transform.std),
            }
        self.preprocessing = dict(preprocessing)

    def _classifier(self) -> Sequence[str]:
        return (self._left_out,)

    def _prepare(self, images: Tensor) -> Tensor:
        # As in torchvision's own transforms, which resize bytes before they are scaled.
        resized = self._resized(images)
        return self._normalised(resized / 255 if resized.dtype is torch.uint8 else resized)


def _torchvision(part: str, needed_for: str) -> Any:
    return import_optional(f"torchvision.{part}", needed_for=needed_for, extra="vision")


def _load_weights(model: nn.Module, path: Path, *, classifier: Sequence[str]) -> None:
    if path.suffix == ".safetensors":
        entries = import_optional("safetensors.torch", needed_for="`weights`", extra="vision").load_file(path)
    else:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    prefixes = tuple(f"{name}." for name in classifier)
    model.load_state_dict({key: value for key, value in entries.items() if not key.startswith(prefixes)})


def _as_tensor(image: Any) -> Tensor:
    """Return an image as a tensor (3, height, width)."""
    if hasattr(image, "convert"):
        tensor: Tensor = _torchvision("transforms.functional", "images").pil_to_tensor(image.convert("RGB"))
        return tensor
    if isinstance(image, Tensor):
        tensor = image
    else:
        tensor = torch.as_tensor(image)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.ndim != 3 or len(tensor) != 3:
        raise UserValueError(
            "Expected an image to be a PIL image, a tensor (3, height, width) or an array (height, width, 3), "
            f"but got the shape {tuple(tensor.shape)}."
        )
    return tensor
