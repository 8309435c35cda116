"""Six settings under two schedules, and two with a backbone in the loop: freezing by default against never freezing.

- supervised: clinc150_minilm and cifar10_resnet_features, by the configurations in ``configs/``; solved at the freeze.
- projection: lightly's ``SimCLRProjectionHead`` on cached views of cifar10_resnet_views and of scikit-learn's digits;
  scored by the 20 nearest neighbours of the projections. The loss cannot be solved: once the head is frozen, its last
  layer trains on path activations that are computed once.
- few-shot: an MLP by class prototypes, 5-way 1-shot on Omniglot, 20-way 1-shot on the intents of clinc150. Not solved.
- end to end: a frozen convolutional network in the loop, 12 epochs against ``one_pass=True``, see ``end_to_end.py``.

Constant rates are stopped early (patience 3); one-cycle goes on to its end. ``output@3`` freezes at epoch 3, whatever
the rule says, where nothing can be solved. All settings are run for one seed before the next seed begins. Finished runs
are kept in ``--to``, where the same command goes on after an interruption.

    GLAI_DATA=folder/with/npz python benchmarks/six_settings.py
"""

import argparse
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import end_to_end
import numpy as np
import torch
from compare_supervised import CONFIGS
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import Callback, Trainer
from measuring import RESULTS, comparison_rows, save_results, use_one_thread
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from glai_lightning import PrototypicalModule, SimCLRModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.cli.compare import compare_configuration
from glai_lightning.comparison import Comparison, compare
from glai_lightning.comparison.variants import VARIANTS, Variant
from glai_lightning.datamodules import DigitViewsDataModule, EpisodesDataModule, OmniglotDataModule, ViewsDataModule
from glai_lightning.heads.path_activations import cache_path_activations, output_layers

AT_EPOCH_3 = Variant("output@3", "output paths, frozen at epoch 3, trained on", "output", freeze_at_epoch=3)
ONE_CYCLE_EPOCHS = 10
COLUMNS = ("variant", "seed", "epochs", "freeze_epoch", "finished_cpu_seconds", "best_val_score", "test_score")
MakeFit = Callable[[int], tuple[Any, Any, Trainer]]


class CachePathActivations(Callback):
    """Once the head is frozen, computes the path activations of all cached views, and trains the last layer on them."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Replace the views where they lie, so that the data loaders go on in their order."""
        freeze = [one for one in trainer.callbacks if isinstance(one, StructureFreezeCallback)]
        head = pl_module.head
        if freeze and freeze[0].frozen and "forward" not in vars(head):
            for views in trainer.datamodule.splits.values():
                views.views = cache_path_activations(head, views.views)
            # Set on the instance: the names of the head's weights stay as they are.
            head.forward = output_layers(head).forward


def fit_options(schedule: str, data: Any, constant: float, largest: float) -> tuple[dict[str, Any], int]:
    """Return optimizer and schedule of a module, and the epochs of its fit."""
    options: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=constant, fused=True)}
    if schedule == "constant":
        return options, 40
    steps = ONE_CYCLE_EPOCHS * len(data.train_dataloader())
    return options | {"lr_scheduler": partial(OneCycleLR, max_lr=largest, total_steps=steps)}, ONE_CYCLE_EPOCHS


@cache
def digit_views() -> dict[str, torch.Tensor]:
    """Return four augmentations of each digit, as the digits' own data module makes them."""
    digits = DigitViewsDataModule()
    torch.manual_seed(0)
    views = [torch.stack([digits.transform(image).flatten() for image, _ in digits.dataset]) for _ in range(4)]
    return {"views": torch.stack(views), "y": digits.dataset.tensors[1]}


def projection(arrays: Callable[[], Any], features: int, schedule: str) -> MakeFit:
    def make_fit(seed: int) -> tuple[SimCLRModule, ViewsDataModule, Trainer]:
        data = ViewsDataModule(arrays=arrays(), batch_size=128, test_fraction=0.2, seed=seed)
        options, epochs = fit_options(schedule, data, 1e-3, 3e-3)
        module = SimCLRModule(SimCLRProjectionHead(features, 512, 128), knn_neighbors=20, **options)
        return module, data, trainer(epochs, CachePathActivations())

    return make_fit


def few_shot(make_data: Callable[[int], EpisodesDataModule], features: int, schedule: str) -> MakeFit:
    def make_fit(seed: int) -> tuple[PrototypicalModule, EpisodesDataModule, Trainer]:
        data = make_data(seed)
        options, epochs = fit_options(schedule, data, 3e-4, 1e-3)
        module = PrototypicalModule(mlp_head(features, 512, 64), nn.Flatten(), **options)
        return module, data, trainer(epochs, limit_val_batches=100)

    return make_fit


def without_a_head(make_data: Callable[[int], EpisodesDataModule], seeds: int) -> list[float]:
    """Return the test accuracy, seed by seed, of distances between the inputs themselves."""
    module, accuracies = PrototypicalModule(nn.Flatten()), []
    for seed in range(seeds):
        (metrics,) = trainer(1, enable_progress_bar=False).test(module, make_data(seed), verbose=False)
        accuracies.append(metrics["test/accuracy"])
    return accuracies


def clinc_episodes(folder: Path, seed: int) -> EpisodesDataModule:
    """Return episodes of intents; a third of them is for validation, and another for testing."""
    with np.load(folder / "clinc150_minilm.npz") as archive:
        arrays = {name: np.concatenate([archive[f"{name}_{part}"] for part in ("train", "test")]) for name in "xy"}
    thirds = {"train": 1 / 3, "val": 1 / 3, "test": 1 / 3}
    return EpisodesDataModule(arrays=arrays, ways=20, queries=5, classes=thirds, seed=seed)


def episodes_of(folder: Path) -> dict[str, Callable[[int], EpisodesDataModule]]:
    """Return what makes the data of the two few-shot settings out of a seed."""
    return {
        "omniglot": lambda seed: OmniglotDataModule(seed=seed),
        "clinc150_episodes": partial(clinc_episodes, folder),
    }


def omniglot() -> MakeFit:
    """Return the fits of a head on 67 characters of three alphabets, after a backbone that is trained on the others.

    Of the 20 people who drew each of them four are for testing, and the rest for training and validation.
    """
    splits = OmniglotDataModule().splits
    images, labels = splits["train"].inputs.float().unsqueeze(1), splits["train"].labels
    pretraining = torch.isin(labels, labels[torch.from_numpy(splits["train"]._rows).flatten()])
    torch.manual_seed(0)
    backbone = end_to_end.pretrain(images[pretraining], labels[pretraining].unique(return_inverse=True)[1])
    images, targets = images[~pretraining], labels[~pretraining].unique(return_inverse=True)[1]
    tested = torch.arange(len(images)) % 20 >= 16
    inputs = {"train": images[~tested], "test": images[tested]}
    return end_to_end.fits_on(backbone, inputs, {"train": targets[~tested], "test": targets[tested]})


def in_one_pass(make: Callable[[], MakeFit], seed: int) -> tuple[Any, Any, Trainer]:
    """Return an end-to-end fit with the callback that reads the data once; the MLP is fitted without it."""
    module, data, _ = make()(seed)
    return module, data, trainer(end_to_end.EPOCHS, StructureFreezeCallback(one_pass=True))


def trainer(epochs: int, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), **options)


def all_settings(folder: Path) -> dict[tuple[str, str, str], Callable[[Path, int], Comparison]]:
    """Return, by kind, data and schedule, what compares so many seeds in a folder."""

    def run(make_fit: MakeFit, score: str, variants: str, patience: int | None, to: Path, seeds: int) -> Comparison:
        settings = {"score": f"val/{score}", "variants": variants, "patience": patience, "progress": False}
        return compare(make_fit, mode="max", to=to, seeds=seeds, **settings)

    def run_configuration(name: str, to: Path, seeds: int) -> Comparison:
        files = [
            "--config",
            str(CONFIGS / f"{name}.yaml"),
            "--data.path",
            str(folder / f"{name.rsplit('_', 1)[0]}.npz"),
        ]
        return compare_configuration([*files, "--variants", "mlp,output+solve", "--seeds", str(seeds), "--to", str(to)])

    @cache
    def cifar_views() -> dict[str, torch.Tensor]:
        with np.load(folder / "cifar10_resnet_views.npz") as archive:
            return {name: torch.from_numpy(archive[name]) for name in ("views", "y")}

    settings: dict[tuple[str, str, str], Callable[[Path, int], Comparison]] = {}
    for schedule, patience in (("constant", 3), ("onecycle", None)):
        for name in ("clinc150_minilm", "cifar10_resnet_features"):
            settings["supervised", name, schedule] = partial(run_configuration, f"{name}_{schedule}")
        for name, views, features in (("cifar10_resnet_views", cifar_views, 192), ("digits", digit_views, 64)):
            make_fit = projection(views, features, schedule)
            variants = "mlp,output,output@3"
            settings["projection", name, schedule] = partial(run, make_fit, "knn_projections", variants, patience)
        for (name, make_data), features in zip(episodes_of(folder).items(), (784, 384), strict=True):
            make_fit = few_shot(make_data, features, schedule)
            settings["few-shot", name, schedule] = partial(run, make_fit, "accuracy", "mlp,output,output@3", patience)
    for name, make in (("fashion_mnist", partial(end_to_end.fashion_mnist, folder)), ("omniglot", omniglot)):
        make_fit = partial(in_one_pass, cache(make))
        settings["end to end", name, "12 epochs"] = partial(run, make_fit, "accuracy", "mlp,output+solve", None)
    return settings


def print_summary(comparisons: dict[tuple[str, str, str], Comparison]) -> None:
    """Print every side of every setting, and the geometric means of the sides that are judged."""
    judged: dict[str, list[float]] = {"six settings": [], "end to end": []}
    for (kind, *setting), comparison in comparisons.items():
        for variant, side in comparison.summary.items():
            if variant != "mlp":
                difference = side.test_difference
                ends = (
                    "" if difference.low is None else f" ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
                )
                print(
                    f"{kind}, {', '.join(setting)}, {variant}: {side.speedup_finished.mean:.2f} times, "
                    f"{100 * difference.mean:+.2f}{ends} points, frozen in {side.frozen_runs} of {side.num_runs}"
                )
        times = comparison.summary[comparison.verdict.variant].speedup_finished.mean
        judged["end to end" if kind == "end to end" else "six settings"].append(times)
    for name, times in judged.items():
        if times:
            print(f"{name}: {statistics.geometric_mean(times):.2f} times in the geometric mean of {len(times)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GLAI_DATA", "."), help="folder of .npz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["supervised", "projection", "few-shot", "end to end"])
    parser.add_argument("--to", type=Path, default=Path("runs") / "comparison", help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    use_one_thread()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    VARIANTS[AT_EPOCH_3.name] = AT_EPOCH_3
    settings = {key: run for key, run in all_settings(arguments.data).items() if key[0] in arguments.kinds}
    for seeds in range(1, arguments.seeds + 1):
        comparisons = {}
        for key, run in settings.items():
            comparisons[key] = run(arguments.to / "_".join(key).replace(" ", "_"), seeds)
            print(*key, comparisons[key].verdict.sentence, flush=True)
        rows = [
            {"kind": kind, "data": name, "schedule": schedule, **{column: row[column] for column in COLUMNS}}
            for (kind, name, schedule), comparison in comparisons.items()
            for row in comparison_rows(comparison)
        ]
        save_results("six_settings", rows, arguments.results)
        print_summary(comparisons)
    if "few-shot" in arguments.kinds:
        rows = [
            {"data": name, "seed": seed, "test_score": round(accuracy, 6)}
            for name, make_data in episodes_of(arguments.data).items()
            for seed, accuracy in enumerate(without_a_head(make_data, arguments.seeds))
        ]
        save_results("few_shot_without_head", rows, arguments.results)


if __name__ == "__main__":
    main()
