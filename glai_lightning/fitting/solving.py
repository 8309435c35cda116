"""Solving for the path weights of a head that was just frozen, in the middle of a fit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from glai_lightning.fitting.across_processes import process_group, processes_of, share_buffers
from glai_lightning.fitting.collection import (
    Stage,
    StepBatches,
    draws_at_random,
    on_device,
    single_loader,
    untouched,
    watch_step,
    without_a_trace,
)
from glai_lightning.fitting.loss_watching import LossCall
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.patterns import layout_of
from glai_lightning.solvers import LogisticSolver, RidgeSolver, SolveReport
from glai_lightning.solvers.processes import Processes

#: Bytes of head inputs kept in memory for a solve; beyond it every pass of the solve reads the loader anew.
INPUTS_IN_MEMORY = 2**30

Solver = LogisticSolver | RidgeSolver
ReadBatch = Callable[[Any, int], tuple[Tensor, Tensor]]


def check_solvable(head: nn.Module, head_name: str, paths: str) -> None:
    """Refuse, before training starts, a solve that could not be done later.

    Raises:
        MisconfigurationException: for tangent paths, or modules behind the last Linear.
    """
    if paths == "tangent":
        raise UserMisconfigurationError(
            "Expected `paths` to be 'output' or 'independent' with a solver, but got 'tangent', "
            "whose weights the optimizer trains."
        )
    trailing = layout_of(head).trailing
    if trailing:
        raise UserMisconfigurationError(
            f"Expected the head at {head_name!r} to end with its last Linear, so that it can be solved, "
            f"but got `{type(trailing[0]).__name__}` behind it."
        )


def check_loss(calls: list[LossCall], solver: Solver) -> LossCall:
    """Return the one loss call of a training step, if it is the loss that a solver minimises.

    Raises:
        MisconfigurationException: otherwise.
    """
    if len(calls) != 1:
        raise UserMisconfigurationError(
            "Expected `training_step` to call cross_entropy, binary_cross_entropy_with_logits or mse_loss once on the "
            f"outputs of the head, so that it can be solved, but it does so {len(calls)} times. Override "
            "`inputs_and_targets` of the callback to say what the head is to be solved for."
        )
    (call,) = calls
    if call.unusual is not None:
        raise UserMisconfigurationError(_cannot_be_solved(call))
    if isinstance(solver, LogisticSolver) and call.kind == "mse":
        raise UserMisconfigurationError(
            "Expected `solver` to be a `RidgeSolver` for a module that minimises mse_loss, but got `LogisticSolver`."
        )
    return call


def _cannot_be_solved(call: LossCall) -> str:
    return f"Expected the mean {call.kind} of a batch, so that it can be solved, but got {call.unusual}."


def follow_loss(solver: Solver, call: LossCall) -> Solver:
    """Return the solver for the very loss of a module: with its class weights and its label smoothing."""
    if not isinstance(solver, LogisticSolver):
        return solver
    weights = solver.class_weights
    if call.class_weights is not None:
        of_positives = call.class_weights.flatten().tolist()
        weights = [1.0, *of_positives] if call.kind == "binary_cross_entropy" else of_positives
    return dataclasses.replace(
        solver, class_weights=weights, label_smoothing=call.label_smoothing or solver.label_smoothing
    )


def has_validation(trainer: Any) -> bool:
    """Tell whether a fit has validation batches."""
    return bool(trainer.enable_validation) and trainer.val_dataloaders is not None and sum(trainer.num_val_batches) > 0


def validates_by_loss(trainer: Any, pl_module: Any, head: nn.Module) -> bool:
    """Tell whether the targets of a fit's validation data can be seen in a loss call of the validation step."""
    loader = single_loader(trainer.val_dataloaders, "validation")
    with without_a_trace(pl_module):
        batch = on_device(trainer, next(untouched(loader)))
        calls = watch_step(trainer, pl_module, head, batch, 0, stage="validation", outputs=stand_in_for(head))
        seen = bool(calls) and calls[0].unusual is None
    if not seen:
        rank_zero_info(
            "The solve does not look at the validation data, because `validation_step` calls no known loss on the "
            "outputs of the head. Override `inputs_and_targets` of the callback to say what it is to be validated on."
        )
    return seen


def warn_of_moving_inputs(
    pl_module: nn.Module, head: nn.Module, loader: Any, other_heads: Sequence[nn.Module] = ()
) -> None:
    """Warn where what the head is given is not fixed, so that the user knows what the solve means.

    Other heads with a loss of their own are beside this one and not before it.
    """
    inside = {id(module) for module in head.modules()}
    own = {id(parameter) for one in (head, *other_heads) for parameter in one.parameters()}
    before = [module for module in pl_module.modules() if id(module) not in inside]
    reasons = []
    if any(parameter.requires_grad for parameter in pl_module.parameters() if id(parameter) not in own):
        reasons.append("layers outside the head are trained: the solve is for their embeddings as they are by then")
    if any(isinstance(module, _DropoutNd) and module.p > 0 and module.training for module in before):
        reasons.append("there is dropout outside the head: the solve is for embeddings without it")
    if draws_at_random(loader):
        reasons.append("the training data is drawn at random: the solve is for one draw of it")
    for reason in reasons:
        rank_zero_warn(f"The head will be solved over inputs that are not fixed. Here {reason}.")


def stand_in_for(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what gives outputs of the right shape and dtype for head inputs, (..., D) -> (..., C), at no cost."""
    output = layout_of(head).output
    return lambda x: output.weight.new_zeros(*x.shape[:-1], output.out_features)


def read_step(
    trainer: Any, pl_module: Any, head: nn.Module, batch: Any, batch_idx: int, stage: Stage
) -> tuple[Tensor, Tensor]:
    """Read off a step of the module what the head is given, and what it is trained on; the head itself is not run.

    Returns:
        Head inputs (n, D) and targets (n,), without the samples that the loss passes over.

    Raises:
        MisconfigurationException: if the step calls no known loss on the outputs of the head.
    """
    calls = watch_step(trainer, pl_module, head, batch, batch_idx, stage=stage, outputs=stand_in_for(head))
    if not calls:
        raise UserMisconfigurationError(
            f"Expected `{stage}_step` to call a known loss on the outputs of the head, but it calls none. Override "
            "`inputs_and_targets` of the callback to say what the head is to be solved for."
        )
    if calls[0].unusual is not None:
        raise UserMisconfigurationError(_cannot_be_solved(calls[0]))
    inputs, targets = calls[0].inputs, calls[0].targets
    inputs = inputs.reshape(-1, inputs.shape[-1])
    if calls[0].kind == "mse":
        return inputs, targets.reshape(len(inputs), -1)
    targets = targets.reshape(len(inputs))
    if calls[0].kind == "binary_cross_entropy":
        return inputs, targets.long()
    counted = torch.ne(targets, -100 if calls[0].ignore_index is None else calls[0].ignore_index)
    return (inputs, targets) if bool(counted.all()) else (inputs[counted], targets[counted])


def solve_in_fit(
    trainer: Any, head: GLAIHead, solver: Solver, read: Callable[[Stage], ReadBatch], validate: bool
) -> SolveReport:
    """Solve for the path weights of a head over the training data of a fit, and set them.

    Each process of the fit reads its own part of the data; all of them must call this together.

    Args:
        trainer: the Trainer of the fit.
        head: the frozen head, in its place in the module.
        solver: what to solve with.
        read: returns, for a stage, what reads head inputs and targets off a batch and its index.
        validate: whether to choose among the iterates by the validation data of the fit.

    Returns:
        What the solve did.

    Raises:
        MisconfigurationException: if there are several data loaders.
        RuntimeError: if another process of the fit raised an error.
    """
    share_buffers(trainer, trainer.lightning_module)
    processes = processes_of(trainer)
    training = _in_memory(
        processes,
        StepBatches(
            trainer,
            single_loader(trainer.train_dataloader, "training"),
            trainer.num_training_batches,
            read("training"),
        ),
    )
    validation = None
    if validate:
        loader = single_loader(trainer.val_dataloaders, "validation")
        batches = StepBatches(trainer, loader, trainer.num_val_batches[0], read("validation"))
        validation = _in_memory(processes, batches)
    inputs, targets = training if isinstance(training, tuple) else (training, None)
    return solver.solve(head, inputs, targets, validation=validation, group=process_group(trainer))


def _in_memory(processes: Processes, batches: StepBatches) -> tuple[Tensor, Tensor] | StepBatches:
    """Read batches into two tensors, or give them back as they are if that takes a process too much memory."""
    inputs, targets, held = [], [], 0
    with processes.failing_together():
        for batch_inputs, batch_targets in batches:
            inputs.append(batch_inputs)
            targets.append(batch_targets)
            held += batch_inputs.nbytes + batch_targets.nbytes
            if held > INPUTS_IN_MEMORY:
                break
    too_much = processes.sum_numbers(held > INPUTS_IN_MEMORY) != [0.0]
    return batches if too_much or not inputs else (torch.cat(inputs), torch.cat(targets))
