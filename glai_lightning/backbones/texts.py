"""Text encoders of transformers and sentence-transformers, with their tokenizers."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from glai_lightning.backbones.named import NamedBackbone, check_name, sentence_for_the_hub
from glai_lightning.checks import UserValueError, expect_choice, expect_integer
from glai_lightning.optional import import_optional

#: A list of strings, or what a tokenizer makes of it.
Texts = Sequence[str] | Mapping[str, Tensor]


class TransformersBackbone(NamedBackbone):
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
        TypeError: if ``name`` is not a string, or ``max_length`` not an integer.
        ValueError: if ``pooling`` is unknown, ``max_length`` below 1, or model or tokenizer cannot be read.
    """

    def __init__(self, name: str, pooling: Literal["mean", "cls"] = "mean", max_length: int | None = None) -> None:
        super().__init__()
        check_name(name)
        expect_choice("pooling", pooling, ("mean", "cls"))
        if max_length is not None:
            expect_integer("max_length", max_length, least=1)
        transformers: Any = import_optional("transformers", needed_for="`TransformersBackbone`", extra="text")
        with sentence_for_the_hub(name):
            model = transformers.AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self._set(
            model, tokenizer, pooling, min(tokenizer.model_max_length, limit) if max_length is None else max_length
        )

    def _set(self, model: Any, tokenizer: Any, pooling: str, max_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.pooling, self.max_length = pooling, max_length
        self.num_features = model.config.hidden_size

    def _make(self, files: Mapping[str, Tensor], pooling: str, max_length: int) -> None:  # type: ignore[override]
        transformers: Any = import_optional("transformers", needed_for="`TransformersBackbone`", extra="text")
        with _folder_of(files) as folder:
            model = _model_of_random_weights(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._set(model, tokenizer, pooling, max_length)

    def description(self) -> dict[str, Any]:
        """Return the configuration, the tokenizer's files and the pooling, in primitives and tensors of bytes."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return {"files": _files_in(Path(folder)), "pooling": self.pooling, "max_length": self.max_length}

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
        tokens: Mapping[str, Tensor] = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return tokens


class SentenceTransformersBackbone(NamedBackbone):
    """A model of sentence-transformers, with its own tokenizer, pooling and normalisation.

    Args:
        name: name on the hub, or a local folder. Code in it is not run, and weights are read from safetensors only.

    Attributes:
        num_features: width D of the embeddings.

    Raises:
        ModuleNotFoundError: if sentence-transformers is not installed.
        TypeError: if ``name`` is not a string.
        ValueError: if the model cannot be read.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        check_name(name)
        with sentence_for_the_hub(name):
            self._read(name)

    def _read(self, name: str) -> None:
        library: Any = import_optional(
            "sentence_transformers", needed_for="`SentenceTransformersBackbone`", extra="text"
        )
        self.model = library.SentenceTransformer(
            name, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
        self.num_features = self.model.get_sentence_embedding_dimension()

    def _make(self, files: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        with _folder_of(files) as folder:
            for config in Path(folder).rglob("config.json"):
                # Pooling has a file of that name too.
                if b"model_type" in config.read_bytes():
                    _model_of_random_weights(config.parent).save_pretrained(config.parent)
            self._read(str(folder))

    def description(self) -> dict[str, Any]:
        """Return configurations and tokenizer, as tensors of the bytes of their files."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(folder, create_model_card=False)
            return {"files": _files_in(Path(folder))}

    def forward(self, texts: Texts) -> Tensor:
        """Embed texts, a list of strings or what ``tokenize`` makes of it -> (batch, D)."""
        tokens = _tokens(texts, self.tokenize, self.model.device)
        embeddings: Tensor = self.model(dict(tokens))["sentence_embedding"]
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return tensors (batch, tokens) by name, padded to the longest text."""
        # Its newer name.
        tokenize = getattr(self.model, "preprocess", None) or self.model.tokenize
        tokens: Mapping[str, Tensor] = tokenize(list(texts))
        return tokens


def _tokens(texts: Texts, tokenize: Any, device: Any) -> dict[str, Any]:
    tokens = texts if isinstance(texts, Mapping) else tokenize(texts)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tokens.items()}


def _model_of_random_weights(folder: Path | str) -> Any:
    transformers: Any = import_optional("transformers", needed_for="a text backbone", extra="text")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return transformers.AutoModel.from_config(config, trust_remote_code=False)


def _files_in(folder: Path) -> dict[str, Tensor]:
    """Return the bytes of all files in a folder but those of weights, by relative path."""
    files = (
        file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in (".safetensors", ".bin")
    )
    return {
        file.relative_to(folder).as_posix(): torch.frombuffer(bytearray(file.read_bytes() or b" "), dtype=torch.uint8)
        for file in files
    }


@contextmanager
def _folder_of(files: Mapping[str, Tensor]) -> Iterator[Path]:
    """Write files that come from a checkpoint into a temporary folder, and nowhere else."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix == ".py":
                raise UserValueError(
                    f"Expected the files of a backbone in a checkpoint to lie in one folder, but got {name!r}."
                )
            target = Path(folder, *path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.numpy().tobytes())
        yield Path(folder)
