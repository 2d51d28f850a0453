"""What torch.compile leaves to Python; a module of its own, since its import loads the compiler."""

import torch


@torch.compiler.disable(reason="process_group: the ranks compare their arguments on the host")
def eagerly(function, *args):
    return function(*args)
