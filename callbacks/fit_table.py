"""The table that sums up a fit, in 80 columns."""

import textwrap
from collections.abc import Sequence

from glai_lightning.fitting.fit_record import EpochRecord, FitRecord, seconds_per_step

_WIDTH = 80
_NAME_WIDTH = 27
_CELL_WIDTH = 17
#: A score still rises where its last step is more than this part of all that it rose.
_STILL_RISES = 0.1


def fit_table(record: FitRecord) -> str:
    """Write a fit up as a table in plain text.

    Args:
        record: what the fit was like.

    Returns:
        Lines of at most 80 columns: when the structure froze and why; parameters, optimizer state and seconds before
        and after; scores; and one sentence on what the freeze did.

    Example:
        >>> epochs = [EpochRecord(0, val_score=0.8, steps=10, trainable_parameters=500, optimizer_state_bytes=4000)]
        >>> epochs += [EpochRecord(1, val_score=0.9, steps=10, trainable_parameters=100, optimizer_state_bytes=800)]
        >>> epochs[1].trained_frozen = epochs[1].frozen = True
        >>> reason = "asked to freeze at epoch 1"
        >>> record = FitRecord(epochs=epochs, frozen=True, freeze_epoch=1, freeze_step=10, freeze_reason=reason)
        >>> lines = fit_table(record).splitlines()
        >>> print(lines[1])
          structure                  frozen after 1 epoch (step 10): asked to freeze at
        >>> print(lines[7])
          optimizer state [bytes]                4,000              800             5.00
    """
    table = [*_field("structure", _structure(record)), "", *_phases(record), "", *_scores(record), ""]
    return "\n".join(["Fit report", *table, *_wrapped(_sentence(record)), *_wrapped(_warning(record))])


def _structure(record: FitRecord) -> str:
    if record.frozen:
        return f"{_when(record)}: {record.freeze_reason}"
    measured = [epoch.churn for epoch in record.epochs if epoch.churn is not None]
    churn = f"{measured[-1]:.2%} at the last check, {max(measured):.2%} at most" if measured else "not measured"
    return f"did not settle in {_epochs(record.num_epochs)} (churn {churn}): the head stays an MLP"


def _when(record: FitRecord) -> str:
    epoch, step = record.freeze_epoch, record.freeze_step
    if epoch is None:
        return "frozen before this fit"
    if step == 0 or (epoch == 0 and step is None):
        return "frozen before the first step"
    at = "" if step is None else f" (step {step:,})"
    if any(row.epoch == epoch and not row.trained_frozen and row.steps for row in record.epochs):
        return f"frozen in epoch {epoch}{at}"
    return f"frozen after {_epochs(epoch)}{at}"


def _epochs(number: int) -> str:
    return f"{number} epoch" if number == 1 else f"{number} epochs"


def _phases(record: FitRecord) -> list[str]:
    before, after = record.phase(frozen=False), record.phase(frozen=True)
    # An epoch at whose end the head was frozen and solved has the sizes of the frozen head.
    mlp = [row for row in before if not row.frozen]
    frozen = [row for row in record.epochs[-1:] if row.frozen]
    parameters = [mlp[-1].trainable_parameters if mlp else record.mlp_parameters]
    parameters += [frozen[0].trainable_parameters if frozen else None]
    state = [rows[-1].optimizer_state_bytes if rows else None for rows in (mlp, frozen)]
    steps = [None if one is None else one.wall for one in (seconds_per_step(before), seconds_per_step(after))]
    lines = [
        f"{_name('')}{'before the freeze':>{_CELL_WIDTH}}{'after':>{_CELL_WIDTH}}{'before / after':>{_CELL_WIDTH}}",
        _row("epochs", [_count(before), _count(after)], "{:,}", ratio=False),
        _row("trainable parameters", parameters, "{:,}"),
        _row("optimizer state [bytes]", state, "{:,}"),
        # No ratio: wall-clock seconds of a step are as much about what else the machine does as about the head.
        _row("seconds per step (median)", steps, "{:.6f}", ratio=False),
        _row("training [s]", [_seconds(before), _seconds(after)], "{:.2f}", ratio=False),
    ]
    if record.solve is not None:
        lines.append(_row("collecting inputs [s]", [None, record.solve.collecting_seconds], "{:.2f}"))
        lines.append(_row("solve [s]", [None, record.solve.seconds], "{:.2f}"))
    total = f"{record.finished_seconds:.2f}, validation included"
    return [*lines, f"{_name('whole fit [s]')}{total}"]


def _count(epochs: list[EpochRecord]) -> int:
    return len({epoch.epoch for epoch in epochs})


def _seconds(epochs: list[EpochRecord]) -> float | None:
    return sum(epoch.training_seconds for epoch in epochs) if epochs else None


def _row(name: str, values: Sequence[float | None], form: str, *, ratio: bool = True) -> str:
    cells = ["-" if value is None else form.format(value) for value in values]
    before, after = values
    cells.append(f"{before / after:.2f}" if ratio and before is not None and after else "")
    return (_name(name) + "".join(f"{cell:>{_CELL_WIDTH}}" for cell in cells)).rstrip()


def _scores(record: FitRecord) -> list[str]:
    best = record.best
    if record.score_name is None:
        lines = _field("validation", "no score is monitored")
    elif best is None:
        lines = _field(record.score_name, "not logged by a validation of this fit")
    else:
        last = record.scored[-1]
        lines = _field(record.score_name, f"best {_score(record, best)}")
        if last is not best:
            lines += _field("", f"last {_score(record, last)}")
    for name, score in record.test_scores.items():
        lines += _field(name, f"{score:.4f} ({record.tested})")
    return lines


def _score(record: FitRecord, epoch: EpochRecord) -> str:
    state = "not frozen"
    if epoch.frozen:
        state = "solved" if record.solve is not None and not epoch.trained_frozen else "frozen"
    return f"{epoch.val_score:.4f} (epoch {epoch.epoch}, {state})"


def _sentence(record: FitRecord) -> str:
    """Say what the freeze and the solve did to score and time."""
    if not record.frozen:
        return "Nothing was frozen: score and time are those of the MLP."
    ended = f"The fit ended after {_epochs(record.num_epochs)}"
    if record.max_epochs is not None and record.num_epochs < record.max_epochs:
        ended += f" of {record.max_epochs}"
    before, after = record.phase(frozen=False), record.phase(frozen=True)
    if record.solve is not None:
        seconds, solve = record.solve.collecting_seconds + record.solve.seconds, record.solve
        took = f"The solve took {seconds:.2f} s, collecting included"
        if solve.start_score is not None and solve.score is not None:
            before_it, after_it = f"{solve.start_score:.4f}", f"{solve.score:.4f}"
            kept = before_it == after_it
            took += ", and left the validation score at " if kept else ", and changed the validation score from "
            took += after_it if kept else f"{before_it} to {after_it}"
        return f"{took}. {ended}."
    choose = max if record.mode == "max" else min
    scores = [[row.val_score for row in rows if row.val_score is not None] for rows in (before, after)]
    step_before, step_after = seconds_per_step(before), seconds_per_step(after)
    if not all(scores) or step_before is None or step_after is None or step_before.wall == 0:
        return f"{ended}, {_count(after)} of them frozen."
    return (
        f"The best {record.score_name} was {choose(scores[0]):.4f} before the freeze and is {choose(scores[1]):.4f} "
        f"after it; a step took {step_after.wall / step_before.wall:.2f} times as long after it. {ended}."
    )


def _warning(record: FitRecord) -> str:
    """Warn of a freeze before which the score was still rising."""
    sign = 1 if record.mode == "max" else -1
    scores = [sign * row.val_score for row in record.scored if not row.frozen and row.val_score is not None]
    if not record.frozen or len(scores) < 2 or scores[-1] < max(scores):
        return ""
    rose, all_of_it = scores[-1] - scores[-2], scores[-1] - scores[0]
    if rose <= 0 or rose <= _STILL_RISES * all_of_it:
        return ""
    change = "rising" if record.mode == "max" else "falling"
    return (
        f"Warning: {record.score_name} was still {change} before the freeze ({scores[-2] * sign:.4f}, then "
        f"{scores[-1] * sign:.4f}). A later freeze may end with a better score: try `min_epochs`, or a smaller "
        "`relative_tolerance`."
    )


def _field(name: str, text: str) -> list[str]:
    first = _name(name)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(_name("")),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)


def _name(name: str) -> str:
    return f"  {name:<{_NAME_WIDTH - 1}} "
