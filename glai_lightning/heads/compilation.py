"""Compiling one module as another was compiled."""

from torch import nn


def compile_like(module: nn.Module, compiled: nn.Module) -> None:
    """Compile a module in place, with the options that were given to ``compiled.compile(...)``; nothing if it was not.

    Example:
        >>> from torch import nn
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> one.compile(backend="eager")
        >>> compile_like(other, one)
        >>> other._compiled_call_impl is not None
        True
    """
    wrapper = compiled._compiled_call_impl
    if wrapper is None:
        return
    from torch._dynamo.eval_frame import OptimizeContext

    # torch keeps backend, mode and options in what the wrapper closes over, and nowhere else.
    captured = (cell.cell_contents for cell in wrapper.__closure__ or ())
    context = next((value for value in captured if isinstance(value, OptimizeContext)), None)
    if context is None:
        module.compile()
    else:
        module._compiled_call_impl = context(module._call_impl)
