"""The table that sums up a fit."""

from collections.abc import Callable

from glai_lightning.fitting.fit_record import EpochRecord, FitRecord, seconds_per_step

_NAME_WIDTH = 28
_CELL_WIDTH = 19


def fit_table(record: FitRecord) -> str:
    """Write a fit up as a table in plain text.

    Args:
        record: what the fit was like.

    Returns:
        Lines, none of them ended by spaces: when the structure froze and why; parameters, optimizer state and seconds
        before and after; scores.

    Example:
        >>> epochs = [EpochRecord(0, 2.0, 10, False, 0.2, 0.8, 500, 4000)]
        >>> epochs += [EpochRecord(1, 1.0, 10, True, None, 0.9, 100, 800)]
        >>> record = FitRecord(epochs, True, 1, "asked to freeze at epoch 1", 0.1, 0.25, "val/accuracy")
        >>> lines = fit_table(record).splitlines()
        >>> print(lines[1])
          structure                   frozen at the start of epoch 1: asked to freeze at epoch 1
        >>> print(lines[6])
          optimizer state [bytes]                   4,000                800               5.00
    """
    return "\n".join(
        ["Fit report", f"{_name('structure')}{_structure(record)}", "", *_phases(record), "", *_scores(record)]
    )


def _structure(record: FitRecord) -> str:
    if record.frozen:
        when = "before this fit" if record.freeze_epoch is None else f"at the start of epoch {record.freeze_epoch}"
        return f"frozen {when}: {record.freeze_reason}"
    measured = [epoch.churn for epoch in record.epochs if epoch.churn is not None]
    churn = f"{measured[-1]:.2%} at the last check, {max(measured):.2%} at most" if measured else "not measured"
    return f"did not settle before the last of {len(record.epochs)} epochs (churn {churn}): the head stays an MLP"


def _phases(record: FitRecord) -> list[str]:
    before, after = record.phase(frozen=False), record.phase(frozen=True)
    parameters_before = before[-1].trainable_parameters if before else record.mlp_parameters
    heading = (
        f"{_name('')}{'before the freeze':>{_CELL_WIDTH}}{'after':>{_CELL_WIDTH}}{'before / after':>{_CELL_WIDTH}}"
    )
    return [
        heading,
        _row("epochs", len(before), len(after), "{:,}".format, ratio=False),
        _row("trainable parameters", parameters_before, _last(after, "trainable_parameters"), "{:,}".format),
        _row(
            "optimizer state [bytes]",
            _last(before, "optimizer_state_bytes"),
            _last(after, "optimizer_state_bytes"),
            "{:,}".format,
        ),
        # No ratio: wall-clock seconds of a step are as much about what else the machine does as about the head.
        _row(
            "seconds per step (median)", seconds_per_step(before), seconds_per_step(after), "{:.6f}".format, ratio=False
        ),
        _row("training seconds", _seconds(before), _seconds(after), "{:.2f}".format, ratio=False),
    ]


def _last(epochs: list[EpochRecord], name: str) -> int | None:
    return getattr(epochs[-1], name) if epochs else None


def _seconds(epochs: list[EpochRecord]) -> float | None:
    return sum(epoch.seconds for epoch in epochs) if epochs else None


def _row(
    name: str,
    before: float | None,
    after: float | None,
    write: Callable[[float], str],
    *,
    ratio: bool = True,
) -> str:
    cells = ["-" if value is None else write(value) for value in (before, after)]
    cells.append(f"{before / after:.2f}" if ratio and before is not None and after else "")
    return (_name(name) + "".join(f"{cell:>{_CELL_WIDTH}}" for cell in cells)).rstrip()


def _scores(record: FitRecord) -> list[str]:
    best = record.best
    if record.score_name is None:
        lines = [f"{_name('validation')}no score is monitored"]
    elif best is None:
        lines = [f"{_name(record.score_name)}not logged by a validation of this fit"]
    else:
        last = record.scored[-1]
        lines = [f"{_name(record.score_name)}best {_score(best)}, last {_score(last)}"]
    for name, score in record.test_scores.items():
        lines.append(f"{_name(name)}{score:.4f} ({record.tested})")
    return lines


def _score(epoch: EpochRecord) -> str:
    return f"{epoch.score:.4f} (epoch {epoch.epoch}, {'frozen' if epoch.frozen else 'not frozen'})"


def _name(name: str) -> str:
    return f"  {name:<{_NAME_WIDTH}}"
