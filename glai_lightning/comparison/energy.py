"""The energy that a run takes, where codecarbon is installed."""

import importlib
import importlib.util
import logging
from typing import Any, Protocol


class EnergyMeter(Protocol):
    """Measures the energy of one run after another."""

    def start(self) -> None:
        """Start to measure."""

    def stop(self) -> float | None:
        """Return the watt-hours since the start, ``None`` if they were not measured."""


class NoMeter:
    """Stands in where codecarbon is not installed."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> float | None:
        """Return ``None``."""
        return None


class CodecarbonMeter:
    """Measures with codecarbon's offline tracker, which asks nothing of the network and writes no file.

    Where processor or memory do not tell their power, codecarbon estimates it from the model and the load.
    """

    def __init__(self) -> None:
        codecarbon = importlib.import_module("codecarbon")
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        # The country matters to emissions, not to energy. What runs are given is the time between two readings.
        self._tracker: Any = codecarbon.OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, log_level="critical", allow_multiple_runs=True
        )

    def start(self) -> None:
        """Start to measure."""
        self._tracker.start_task()

    def stop(self) -> float | None:
        """Return the watt-hours since the start."""
        return float(1000 * self._tracker.stop_task().energy_consumed)


def find_meter() -> EnergyMeter:
    """Return a meter: codecarbon's where it is installed (extra ``energy``)."""
    return NoMeter() if importlib.util.find_spec("codecarbon") is None else CodecarbonMeter()
