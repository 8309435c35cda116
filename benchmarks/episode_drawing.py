"""How many episodes a second one core draws: 20-way 5-shot, 15 queries, 384-dimensional features.

    python benchmarks/episode_drawing.py

Whole episodes out of the loader that a fit reads: rows drawn, gathered, converted to float32 and standardised, with the
labels of support and query. The features are stored in half precision.
"""

import torch
from measuring import measure, median_cpu, save_results, use_one_thread

from glai_lightning.datamodules import EpisodesDataModule

WAYS, SHOTS, QUERIES, FEATURES = 20, 5, 15, 384
EPISODES, ROUNDS = 2_000, 5


def main() -> None:
    use_one_thread()
    rows = []
    for classes, per_class in ((150, 100), (100, 600)):
        labels = torch.arange(classes * per_class) % classes
        data = EpisodesDataModule(
            arrays={"x": torch.randn(len(labels), FEATURES).half(), "y": labels},
            ways=WAYS,
            shots=SHOTS,
            queries=QUERIES,
            train_episodes=EPISODES,
        )
        loader = data.train_dataloader()

        def draw(loader=loader) -> None:
            for _ in loader:
                pass

        draw()
        seconds = median_cpu([measure(draw) for _ in range(ROUNDS)])
        rows.append(
            {
                "ways": WAYS,
                "shots": SHOTS,
                "queries": QUERIES,
                "features": FEATURES,
                "classes": classes,
                "samples_per_class": per_class,
                "episodes_per_cpu_second": round(EPISODES / seconds),
                "expected": "at least 2000",
            }
        )
    save_results("episode_drawing", rows)


if __name__ == "__main__":
    main()
