"""The FFN blocks of a small causal language model, frozen while it trains, against never frozen.

About a million parameters: four layers of ``nn.TransformerEncoderLayer`` with a causal mask, width 144, FFNs of 576
units, characters, 64 of them at a time, 8 rows a step, AdamW at a constant 3e-3 after 50 steps of warm-up. The text is
what Python and scikit-learn ship: the language reference of ``pydoc_data.topics`` and the descriptions of data sets,
508 kB; every tenth row is for validation. All sides see the same batches. An epoch is ``--epoch_steps`` steps.

    python benchmarks/transformer_ffn.py
"""

import argparse
import csv
import itertools
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from measuring import RESULTS, interleave, machine, median_cpu, quiet_trainer, save_results, use_one_thread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning.callbacks import StructureFreezeCallback, StructureMonitor, StructureRevert
from glai_lightning.fitting.heads_in_module import match_heads
from glai_lightning.heads import freeze_in_place
from glai_lightning.heads.joined import head_at

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, LAYERS, HEADS, CONTEXT, BATCH, RATE, WARMUP = 144, 4, 4, 64, 8, 3e-3, 50
FFN = "layers.*.linear1+linear2"
SIDES = ("never frozen", "frozen by churn", "frozen at half", "frozen by churn, with StructureRevert")


def corpus() -> str:
    """Return the text."""
    descriptions = sorted((Path(sklearn.__file__).parent / "datasets" / "descr").glob("*.rst"))
    return "\n".join([*(topics[name] for name in sorted(topics)), *(path.read_text() for path in descriptions)])


def loaders(seed: int = 0) -> tuple[DataLoader[Any], DataLoader[Any], int]:
    """Return the loaders of training and validation, rows of 65 characters, and the number of characters."""
    text = corpus()
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([characters[character] for character in text])
    rows = numbers[: len(numbers) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    held_out = torch.arange(len(rows)) % 10 == 9
    train, val = rows[~held_out], rows[held_out]
    order = torch.Generator().manual_seed(seed)
    return (
        DataLoader(TensorDataset(train), BATCH, shuffle=True, drop_last=True, generator=order),
        DataLoader(TensorDataset(val[:: len(val) // 128]), 64),
        len(characters),
    )


class LanguageModel(LightningModule):
    """A causal Transformer over characters."""

    def __init__(self, characters: int, activation: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, activation, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, characters)

    def loss(self, rows: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next character: (B, T + 1) -> ()."""
        x = self.embed(rows[:, :-1]) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=x.device)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), rows[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> Any:
        """Return AdamW with a warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), RATE)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=WARMUP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class Curve(Callback):
    """Keeps the validation loss after each epoch, with the CPU seconds of the fit by then, and its memory."""

    def __init__(self) -> None:
        self.began = time.process_time()
        self.rows: list[dict[str, float]] = []
        self.gradient_bytes = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Count the gradients."""
        self.gradient_bytes = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the loss."""
        loss = float(trainer.callback_metrics["val_loss"])
        state = [value for of in trainer.optimizers[0].state.values() for value in of.values()]
        self.rows.append(
            {
                "step": trainer.global_step,
                "cpu_seconds": round(time.process_time() - self.began, 3),
                "val_loss": round(loss, 5),
                "optimizer_bytes": sum(value.nbytes for value in state if isinstance(value, Tensor)),
                "gradient_bytes": self.gradient_bytes,
            }
        )


class OffTheClock(StructureMonitor):
    """Measures churn, for the picture, where nothing else does; its checks are not on the clock of the curve."""

    def __init__(self, curve: Curve) -> None:
        super().__init__(FFN)
        self.curve = curve

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure churn after the last batch of an epoch."""
        before = time.process_time()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.curve.began += time.process_time() - before


def fit(activation: str, side: str, seed: int, epochs: int, epoch_steps: int) -> list[dict[str, object]]:
    """Train one side, and return a row for each epoch."""
    seed_everything(seed, verbose=False)
    train, val, characters = loaders(seed)
    module, curve = LanguageModel(characters, activation), Curve()
    half = epochs // 2 if side == SIDES[2] else None
    freeze = StructureFreezeCallback(FFN, solver=None, min_steps=0, freeze_at_epoch=half, verbose=False)
    revert = StructureRevert("val_loss", mode="min")
    monitor = OffTheClock(curve)
    callbacks: dict[str, list[Callback]] = {SIDES[0]: [monitor], SIDES[3]: [freeze, revert]}
    trainer = quiet_trainer(epochs, *callbacks.get(side, [freeze]), curve)
    trainer.limit_train_batches = epoch_steps
    curve.began = time.process_time()
    trainer.fit(module, train, val)
    rows: list[dict[str, object]] = []
    watched = [(watch.churn_history, watch.freeze_epoch) for watch in freeze.heads.values()]
    watched = watched or [(churn, None) for churn in monitor.churn_history.values()]
    for epoch, row in enumerate(curve.rows):
        of_layers: dict[str, object] = {}
        for number in range(LAYERS):
            churn, frozen_at = watched[number]
            of_layers[f"churn_{number}"] = round(churn[epoch], 4) if epoch < len(churn) else ""
            of_layers[f"frozen_{number}"] = int(frozen_at is not None and epoch >= frozen_at)
        reverts = sum(revert.reverts.values()) if side == SIDES[3] else 0
        parameters = sum(parameter.numel() for parameter in module.parameters())
        rows.append(
            {
                "activation": activation,
                "side": side,
                "seed": seed,
                **row,
                **of_layers,
                "reverts": reverts,
                "parameters": parameters,
            }
        )
    return rows


def step_times(activation: str, repeats: int) -> dict[str, float]:
    """Return the CPU seconds of a step with no FFN frozen and with all of them frozen, measured in turn."""
    seed_everything(0, verbose=False)
    train, _, characters = loaders()
    (rows,) = next(iter(train))

    def step_of(*, frozen: bool) -> Any:
        module = LanguageModel(characters, activation)
        if frozen:
            for name in match_heads(module, [FFN]):
                freeze_in_place(head_at(module, name))
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], RATE)

        def step() -> None:
            optimizer.zero_grad()
            module.loss(rows).backward()
            optimizer.step()

        return step

    times = interleave({"never": step_of(frozen=False), "frozen": step_of(frozen=True)}, repeats)
    return {name: median_cpu(of_one) for name, of_one in times.items()}


def loss_at(rows: list[dict[str, Any]], seconds: float) -> float:
    """Return the validation loss at a time of the fit, between epochs on a straight line."""
    return float(np.interp(seconds, [row["cpu_seconds"] for row in rows], [row["val_loss"] for row in rows]))


def summarise(rows: list[dict[str, Any]], steps: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """Return a row for each activation, side and seed, beside the side of that seed that is never frozen."""
    table = []
    for (activation, seed), group in itertools.groupby(rows, lambda row: (row["activation"], row["seed"])):
        of_group = list(group)
        by_side = {side: [row for row in of_group if row["side"] == side] for side in SIDES}
        by_side = {side: of_side for side, of_side in by_side.items() if of_side}
        shortest = min(of_side[-1]["cpu_seconds"] for of_side in by_side.values())
        for side, of_side in by_side.items():
            last = of_side[-1]
            frozen = [sum(row[f"frozen_{number}"] for row in of_side) for number in range(LAYERS)]
            of_step = steps[activation]
            table.append(
                {
                    "activation": activation,
                    "side": side,
                    "seed": int(seed),
                    "frozen_from_step": " ".join(
                        str(int(last["step"] * (len(of_side) - epochs) // len(of_side))) if epochs else "never"
                        for epochs in frozen
                    ),
                    "val_loss": last["val_loss"],
                    "best_val_loss": min(row["val_loss"] for row in of_side),
                    "cpu_seconds": last["cpu_seconds"],
                    "val_loss_at_equal_seconds": round(loss_at(of_side, shortest), 4),
                    "equal_seconds": shortest,
                    "optimizer_bytes": last["optimizer_bytes"],
                    "gradient_bytes": last["gradient_bytes"],
                    "reverts": last["reverts"],
                    "step_never_over_frozen": round(of_step["never"] / of_step["frozen"], 3),
                }
            )
    return table


def draw(rows: list[dict[str, Any]], activations: list[str], path: Path) -> None:
    """Draw, of the first seed, churn in each layer that is never frozen, and the loss of every side over time."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        2, len(activations), figsize=(4.6 * len(activations), 5.6), layout="constrained", squeeze=False
    )
    rows = [row for row in rows if row["seed"] == 0]
    for column, activation in enumerate(activations):
        churn, loss = axes[:, column]
        watched = [row for row in rows if (row["activation"], row["side"]) == (activation, SIDES[0])]
        for number in range(LAYERS):
            points = [(row["step"], 100 * row[f"churn_{number}"]) for row in watched if row[f"churn_{number}"] != ""]
            churn.plot(*zip(*points, strict=True), ".-", label=f"layer {number}")
        churn.axhline(10, color="grey", linestyle=":", linewidth=1, label="threshold")
        churn.set(ylim=(0, None), xlabel="steps", title=f"{activation}: pattern bits flipped since the last check, %")
        for side in SIDES:
            own = [row for row in rows if (row["activation"], row["side"]) == (activation, side)]
            if own:
                loss.plot([row["cpu_seconds"] for row in own], [row["val_loss"] for row in own], ".-", label=side)
        loss.set(xlabel="CPU seconds", title=f"{activation}: validation loss, nats a character")
        for one in (churn, loss):
            one.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return what was measured before; the sides of it are not trained again."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    """Train every side with every activation, in turn, and write two tables and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", nargs="+", default=["relu", "gelu"])
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--epoch_steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20, help="of the steps that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    use_one_thread()
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"transformer_curves_{machine()}.csv"
    rows = read_rows(path) if path.exists() else []
    known = {(row["activation"], row["side"], row["seed"]) for row in rows}
    for seed, side, activation in itertools.product(range(arguments.seeds), arguments.sides, arguments.activations):
        if (activation, side, seed) in known:
            continue
        rows += fit(activation, side, seed, arguments.epochs, arguments.epoch_steps)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(rows[-1], flush=True)
    steps = {activation: step_times(activation, arguments.repeats) for activation in arguments.activations}
    rows.sort(key=lambda row: (row["activation"], row["seed"]))
    save_results("transformer_ffn", summarise(rows, steps), arguments.results)
    draw(rows, arguments.activations, arguments.results / f"transformer_ffn_{machine()}.png")


if __name__ == "__main__":
    main()
