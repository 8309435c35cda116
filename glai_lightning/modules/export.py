"""A trained module in files of several kinds, for use without this package."""

import copy
import io
import json
import logging
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glai_lightning.checks import UserTypeError, UserValueError, expect_choice, expect_writable
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.modules.deployment import Deployed, deployed
from glai_lightning.modules.description import describe
from glai_lightning.modules.standardise import Standardise
from glai_lightning.optional import import_optional

#: Kinds of files, and how their names end.
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "mlp": ".pt", "safetensors": ".safetensors"}


class FromTokens(nn.Module):
    """A text backbone whose tokens are arguments, as exporters want them.

    Args:
        backbone: takes tokens by name.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed tokens (batch, length) that are not masked out -> (batch, D)."""
        embeddings: Tensor = self.backbone({"input_ids": input_ids, "attention_mask": attention_mask})
        return embeddings


def plain_mlp(module: Any) -> nn.Sequential:
    """Return what follows the backbone of a module as layers of ``torch.nn`` alone, without anything frozen.

    Args:
        module: a ``HeadModule``. Its head is an ``nn.Sequential``, or frozen with output paths.

    Returns:
        Copies, in eval mode: a Flatten and a BatchNorm1d that standardises where the module does, and the layers of
        the head, BatchNorm inside a frozen head folded.

    Raises:
        ValueError: if the head is neither.

    Example:
        >>> from glai_lightning import SupervisedModule, mlp_head
        >>> plain_mlp(SupervisedModule(mlp_head(4, 8, 3)))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=3, bias=True)
        )
    """
    head = module.head
    if isinstance(head, GLAIHead):
        head = head.to_mlp()
    if not isinstance(head, nn.Sequential):
        raise UserValueError(
            f"Expected a head that is an `nn.Sequential`, to write it as an MLP, but got `{type(head).__name__}`. "
            "Write it as 'onnx' or 'torch-export'."
        )
    layers = [copy.deepcopy(layer) for layer in head]
    if module.standardise is not None and module.standardise.is_set:
        layers = [nn.Flatten(), _as_batch_norm(module.standardise), *layers]
    return nn.Sequential(*layers).eval()


def export_model(module: Any, to: str, path: str | PathLike[str], example: Any = None) -> Path:
    """Write a trained module to a file, preprocessing included.

    - ``onnx`` and ``torch-export`` hold the deployed module, for any batch size. It takes rows as the data file has
      them, images in [0, 1] of the size that the backbone crops to, texts as ``input_ids`` and ``attention_mask``.
    - ``mlp`` holds what follows the backbone, as layers of ``torch.nn`` (``plain_mlp``): ``torch.load`` returns a dict
      of ``layers``, each a class and its arguments, and a ``state_dict``.
    - ``safetensors`` holds the weights of the deployed module, and in its metadata a description of
      what follows the backbone, in JSON.

    Args:
        module: a ``HeadModule``, such as ``SupervisedModule.load_from_checkpoint`` returns.
        to: 'onnx', 'torch-export', 'mlp' or 'safetensors'.
        path: the file to write; an older one is replaced.
        example: a batch of inputs as they come, of at least two samples, for 'onnx' and 'torch-export'; made up for
            rows, and for backbones of this package.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: if the extra ``export`` is not installed, for 'onnx' and 'safetensors'.
        TypeError: if ``module`` is not a ``HeadModule``.
        ValueError: if there is no such kind or folder, or the module cannot be written as one.
    """
    expect_choice("to", to, tuple(FORMATS))
    _check_module(module)
    path = expect_writable("path", path)
    file = io.BytesIO()
    if to == "onnx":
        file.write(export_onnx(module, None, example).model_proto.SerializeToString())
    elif to == "torch-export":
        if path.suffix != ".pt2":
            raise UserValueError(f"Expected `path` to end in '.pt2' for 'torch-export', but got '{path}'.")
        model, inputs, shapes = _traceable(module, example)
        torch.export.save(
            _traced(model, inputs, lambda: torch.export.export(model, inputs, dynamic_shapes=shapes)), file
        )
    elif to == "mlp":
        mlp = plain_mlp(module)
        described = describe(mlp)
        if described is None:
            raise UserValueError("Expected a head made of layers of `torch.nn` to write it as an MLP, but got others.")
        layers = [[layer["class"], layer["arguments"]] for layer in described["layers"].values()]
        torch.save({"layers": layers, "state_dict": mlp.state_dict(), **_names(module)}, file)
    else:
        safetensors = import_optional("safetensors.torch", needed_for="an export to safetensors", extra="export")
        weights = {name: entry.contiguous() for name, entry in deployed(module).state_dict().items()}
        description: Any = module.description
        described = {name: part for name, part in description().items() if name != "backbone"}
        file.write(safetensors.save(weights, {"glai_lightning": json.dumps(described)}))
    # At once, and only what is whole: torch's own writers have other errors for a path that cannot be written to.
    path.write_bytes(file.getbuffer())
    return path


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module) or not hasattr(module, "deployed"):
        raise UserTypeError(f"Expected `module` to be a `HeadModule`, but got {module!r}.")


def export_onnx(module: Any, path: Any, example: Any = None, **options: Any) -> Any:
    """Write the deployed module as ONNX, see ``HeadModule.to_onnx``."""
    for library in ("onnx", "onnxscript"):
        import_optional(library, needed_for="an export to ONNX", extra="export")
    model, inputs, shapes = _traceable(module, example)
    names = ["input_ids", "attention_mask"] if len(inputs) == 2 else ["inputs"]
    defaults = {"input_names": names, "output_names": ["outputs"], "dynamic_shapes": shapes}
    defaults |= {"dynamo": True, "external_data": False, "verbose": False}
    return _traced(model, inputs, lambda: torch.onnx.export(model, inputs, path, **{**defaults, **options}))


def _traceable(module: Any, example: Any) -> tuple[Deployed, tuple[Tensor, ...], Any]:
    """Return a copy of the deployed module, in eval mode on the CPU, a batch for it, and which sizes may differ."""
    model = copy.deepcopy(deployed(module)).cpu().eval()
    head = model.head
    if isinstance(head, GLAIHead) and head.paths == "output":
        model.head = head.to_mlp().eval()
    if example is None:
        example = _made_up(module)
    if hasattr(module.backbone, "tokenize") and not isinstance(example, tuple):
        tokens = example if not isinstance(example, list) else module.backbone.tokenize(example)
        example = (tokens["input_ids"], tokens["attention_mask"])
        model.first = FromTokens(model.first).eval()
    inputs = tuple(part.cpu() for part in (example if isinstance(example, tuple) else (example,)))
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if len(inputs) > 1:
        # Of tokens; the backbone bounds it.
        sizes[1] = torch.export.Dim.AUTO
    return model, inputs, ((sizes,) * len(inputs),)


def _made_up(module: Any) -> Any:
    backbone = module.backbone
    if backbone is None and module.standardise is not None:
        return torch.zeros(2, module.standardise.scale.numel())
    if hasattr(backbone, "tokenize"):
        return ["one", "another text"]
    if hasattr(backbone, "preprocessing"):
        return torch.zeros(2, 3, *backbone.preprocessing["size"])
    raise UserValueError(
        f"Expected an example of the inputs of `{type(backbone or module.head).__name__}`, but got none "
        "(`glai export --shape 3,32,32` makes up one of that shape)."
    )


def _traced(model: Deployed, inputs: tuple[Tensor, ...], trace: Any) -> Any:
    symbols = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = symbols.level
    try:
        symbols.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What fails here fails with fewer words than in a trace.
            model(*inputs)
            return trace()
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserValueError(f"Expected a module that torch can trace, but it cannot: {lines[0]}") from error
    finally:
        symbols.setLevel(level)


def _as_batch_norm(standardise: Standardise) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(standardise.scale.numel(), eps=0.0, affine=False)
    norm.running_mean, norm.running_var = standardise.mean.sum(0).cpu(), standardise.scale.square().cpu()
    return norm


def _names(module: Any) -> dict[str, Any]:
    names = getattr(module, "classes", None)
    return {} if names is None else {"classes": names}
