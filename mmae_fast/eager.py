"""What torch.compile leaves to Python; a module of its own, since its import loads the compiler."""

import torch


@torch.compiler.disable(reason="process_group: the ranks compare their arguments on the host")
def eagerly(function, *args):
    return function(*args)


@torch.compiler.assume_constant_result
def constant(function):
    """What a function of the installation alone returns: the compiler cannot look into imports."""
    return function()
