"""Count the MLP heads of other libraries that can be read, and say what the rest lacks.

    python benchmarks/readable_heads.py > benchmarks/results/readable_heads.md

Of every model listed here, each class of modules counts once that holds two or more Linear layers (or convolutions that
act as one), whose name says that it is an MLP or a head, and which holds no attention. For the blocks of transformers
whose two layers lie in two modules (``intermediate`` and ``output``) the pair counts, by the name that joins them.
Models are built on the meta device, lightly's heads for real. Nothing is downloaded.
"""

import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from glai_lightning import find_heads
from glai_lightning.heads.joined import head_at
from glai_lightning.heads.layout import read_head
from glai_lightning.heads.recording import is_layer

NAMED = re.compile(r"mlp|ffn|feed_?forward|head|classifier|classification|proj|intermediate|densere", re.IGNORECASE)
TORCHVISION = """
alexnet vgg11 vgg11_bn mobilenet_v3_small vit_b_16 swin_t swin_v2_t convnext_tiny maxvit_t efficientnet_v2_s
squeezenet1_0 mnasnet0_5 fasterrcnn_resnet50_fpn keypointrcnn_resnet50_fpn retinanet_resnet50_fpn raft_small
mvit_v1_b swin3d_t
"""
TIMM = """
vit_tiny_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 convnext_tiny
convnextv2_tiny mixer_s16_224 gmlp_s16_224 resmlp_12_224 cait_xxs24_224 coat_lite_tiny crossvit_tiny_240 davit_tiny
deit3_small_patch16_224 edgenext_xx_small efficientformer_l1 efficientvit_b0 fastvit_t8 focalnet_tiny_srf
gcvit_xxtiny hgnet_tiny hiera_tiny_224 inception_next_tiny levit_128s maxvit_tiny_rw_224 metaformer_baselines_s12
caformer_s18 poolformer_s12 mobilevit_xxs mobilevitv2_050 mobilenetv4_conv_small mvitv2_tiny nest_tiny nextvit_small
pit_ti_224 pvt_v2_b0 repvit_m0_9 rdnet_tiny sequencer2d_s starnet_s1 swiftformer_xs tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_pcpvt_small vit_small_patch14_dinov2 vit_giant_patch14_dinov2 visformer_tiny
volo_d1_224 xcit_nano_12_p16_224 vitamin_small_224
"""
TRANSFORMERS = """
albert bart bert bloom blip clip convbert convnext data2vec-text deberta deberta-v2 deit dinov2 distilbert electra
ernie esm falcon flaubert fnet funnel gemma gemma2 gpt2 gpt_neo gpt_neox gptj granite groupvit hubert ibert layoutlm
llama longformer mamba marian mbart megatron-bert mistral mobilebert mpnet mpt mt5 nystromformer olmo opt pegasus
perceiver persimmon phi phi3 pvt qwen2 qwen3 rembert roberta roc_bert roformer segformer siglip squeezebert stablelm
starcoder2 swin swinv2 t5 umt5 vilt vit vit_mae wav2vec2 wavlm whisper xglm xlm xlm-roberta xlnet xmod yolos yoso
"""


def torchvision_models() -> Iterator[tuple[str, nn.Module]]:
    from torchvision import models

    for name in TORCHVISION.split():
        with torch.device("meta"):
            yield name, models.get_model(name, weights=None, **({"weights_backbone": None} if "fpn" in name else {}))


def timm_models() -> Iterator[tuple[str, nn.Module]]:
    import timm

    for name in TIMM.split():
        with torch.device("meta"), contextlib.suppress(Exception):
            yield name, timm.create_model(name)


def transformers_models() -> Iterator[tuple[str, nn.Module]]:
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification

    for name in TRANSFORMERS.split():
        for auto in (AutoModelForSequenceClassification, AutoModel):
            try:
                config = CONFIG_MAPPING[name]()
                for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
                    for size in ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "num_layers"):
                        if isinstance(getattr(part, size, None), int):
                            setattr(part, size, 1)
                with torch.device("meta"):
                    model = auto.from_config(config)
            except Exception:
                continue
            yield name, model
            break


def lightly_heads() -> Iterator[tuple[str, nn.Module]]:
    from lightly.models.modules import heads

    for name, kind in vars(heads).items():
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == heads.__name__:
            with contextlib.suppress(TypeError):
                yield name, nn.ModuleDict({"head": kind()})


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the class, the module that holds it, and the name of every MLP head in a model."""
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        if {"intermediate", "output"} <= set(parts) and sum(map(is_layer, parts["output"].modules())) == 1:
            inner = next((own for own, part in parts["intermediate"].named_modules() if is_layer(part)), "")
            last = next(own for own, part in parts["output"].named_modules() if is_layer(part))
            if inner:
                place = f"{name}." if name else ""
                yield type(module).__name__, model, f"{place}intermediate.{inner}+{place}output.{last}"
            continue
        kind = type(module).__name__
        layers = sum(map(is_layer, module.modules()))
        attends = any("att" in type(part).__name__.lower() for part in module.modules())
        named = NAMED.search(kind) or NAMED.search(name.rpartition(".")[2])
        if name and layers > 1 and named and not attends and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            holder = kind if type(module) is not nn.Sequential else f"Sequential `{name.rpartition('.')[2]}`"
            yield holder, module, ""


def real_batch(model: nn.Module) -> dict[str, torch.Tensor] | torch.Tensor:
    """Return two samples for a whole model."""
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "pixel_values") == "input_ids":
        mask = torch.ones(2, 16, dtype=torch.long, device=device)
        return {"input_ids": mask, "attention_mask": mask}
    size = getattr(config, "image_size", 224)
    images = torch.zeros(2, 3, *(size if isinstance(size, list | tuple) else (size, size)), device=device)
    return images if config is None else {"pixel_values": images}


def why_unreadable(module: nn.Module, joined: str) -> str | None:
    try:
        layout = read_head(head_at(module, joined) if joined else module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if layout.widths else "no widths"


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    started = time.process_time()
    libraries = {
        "torchvision": torchvision_models,
        "timm": timm_models,
        "transformers": transformers_models,
        "lightly": lightly_heads,
    }
    rows, rest = [], []
    for library, models in libraries.items():
        seen: dict[tuple[str, bool], str | None] = {}
        count = 0
        for model_name, model in models():
            count += 1
            called = False
            for kind, module, joined in candidates(model):
                own = (f"{model_name} {kind}" if kind.startswith("Sequential") else kind, "+" in joined)
                if seen.get(own, "unseen") is None:
                    continue
                reason = why_unreadable(module, joined)
                if reason is not None and not called:
                    # What cannot be called with made-up inputs is read from a call of the whole model.
                    called = True
                    with contextlib.suppress(Exception):
                        find_heads(model, real_batch(model))
                if reason is not None:
                    reason = why_unreadable(module, joined)
                seen[own] = reason
        readable = sum(reason is None for reason in seen.values())
        rows.append(f"| {library} | {count} | {len(seen)} | {readable} | {readable / max(len(seen), 1):.0%} |")
        for (kind, joined), reason in seen.items():
            if reason is not None:
                kind += ", intermediate and output" * joined
                why = " ".join(reason.split())[:200].replace("|", "/")
                rest.append(f"| {library} | {kind} | {why} |")
    print("| library | models | MLP heads | readable | |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print("\nThe rest:\n\n| library | class | why |\n|---|---|---|")
    print("\n".join(rest))
    print(f"{time.process_time() - started:.0f} CPU seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
