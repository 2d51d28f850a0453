"""One rank's mistake is every rank's error."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from mmae_fast import (
    effective_rank,
    fast_coding_rate,
    fast_gram,
    fast_matrix_entropy,
    information,
    losses,
)
from mmae_fast.backends import dispatch

from .accuracy import features

Z = features("gaussian", 7, 4)
MISTAKES = {
    "width": lambda call: call(features("gaussian", 7, 5)),
    "dtype": lambda call: call(Z.double()),
    "batch": lambda call: call(Z[None]),
    "one dimension": lambda call: call(Z[0]),
    "no tensor": lambda call: call([[1.0]]),
    "alpha": lambda call: call(Z, alpha=2.0),
    "wrong alpha": lambda call: call(Z, alpha=-1.0),
    "option": lambda call: call(Z, center=True),
    "mask": lambda call: call(Z, mask=torch.ones(7, dtype=torch.bool)),
    "unknown option": lambda call: call(Z, colour="red"),
    "no argument": lambda call: call(),
    "grad_scale": lambda call: call(Z, grad_scale="sum"),
    "transform": lambda call: torch.vmap(call)(Z[None]),
    "another function": lambda call: effective_rank(
        Z, center=True, process_group=call.keywords["process_group"]
    ),
    "another loss": lambda call: losses.tcr_loss(Z, process_group=call.keywords["process_group"]),
}


def mistaken_on_rank(group, rank, mistake):
    call = partial(fast_matrix_entropy, process_group=group)
    if rank == 1:
        return MISTAKES[mistake](call)
    return call(features("gaussian", 3 + rank, 4))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_ends_all(ranks, mistake):
    failures = ranks(mistaken_on_rank, 3, mistake)
    assert {failure.kind for failure in failures} == {"ValueError"}
    assert len(set(failures)) == 1
    message = failures[0].message
    assert "the ranks of process_group must differ in the number of rows n only" in message
    right = (
        "rank 0 (n = 3), 2 (n = 5): fast_matrix_entropy(z=torch.float32 torch.strided cpu [n, 4]"
    )
    assert right in message
    assert message.count("\n  rank") == 2 and "\n  rank 1 (n = " in message


def without_extension_on_rank(group, rank):
    """As where one node's installation has no compiled backend."""
    before = dispatch.EXTENSION_ERROR
    dispatch.EXTENSION_ERROR = "no such file" if rank == 1 else None
    try:
        return fast_coding_rate(Z, 1.0, backend="cpu", process_group=group)
    finally:
        dispatch.EXTENSION_ERROR = before


def test_a_backend_missing_on_one_rank_ends_all(ranks):
    for failure in ranks(without_extension_on_rank, 2):
        assert failure.kind == "ValueError"
        assert "rank 1 (n = 7): " in failure.message
        assert failure.message.endswith("grad_scale='mean', no such file)")


def wrong_on_rank(group, rank, which):
    if which == "sparse":
        fast_coding_rate(torch.eye(3).to_sparse(), 1.0, process_group=group)
    elif which == "int":
        fast_coding_rate(torch.ones(3, 4, dtype=torch.int64), 1.0, process_group=group)
    elif which == "alpha":
        fast_matrix_entropy(torch.ones(30, 4), -1.0, process_group=group)
    elif which == "mask":
        mask = torch.ones(2, dtype=torch.bool)
        fast_matrix_entropy(torch.ones(30, 4), mask=mask, process_group=group)
    elif which == "side":
        fast_gram(torch.ones(30, 4), side="left", process_group=group)
    elif which == "grad_scale":
        losses.tcr_loss(torch.ones(30, 4), process_group=group, grad_scale="average")
    elif which == "from_gram":
        eye = torch.eye(4)
        information.joint_entropy(eye, eye, from_gram=True, process_group=group)
    elif which == "patches":
        losses.emp_ssl_tcr(torch.ones(30, 4), process_group=group)
    elif which == "group":
        fast_gram(torch.ones(3, 4), process_group="world")
    elif which == "not a member":
        other = dist.new_group([1 - rank], use_local_synchronization=True)
        return str(other), fast_gram(
            torch.ones(3, 4), process_group=dist.GroupMember.NON_GROUP_MEMBER
        )


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [
        ("sparse", "TypeError", "z must be a dense (strided) tensor, got layout torch.sparse_coo"),
        ("int", "TypeError", "z must be float32, float64, bfloat16 or float16, got torch.int64"),
        ("alpha", "ValueError", "alpha must be > 0, got -1.0"),
        ("mask", "ValueError", "mask must have z's shape without its last dimension, (30,), got"),
        ("side", "ValueError", "side must be one of ('auto', 'samples', 'features'), got 'left'"),
        ("grad_scale", "ValueError", "grad_scale must be one of ('mean', 'sum'), got 'average'"),
        ("from_gram", "ValueError", "process_group is not defined for from_gram=True"),
        ("patches", "ValueError", "z must have shape (..., patches, n, d), got (30, 4)"),
        ("group", "TypeError", "torch.distributed.ProcessGroup (or None), got str 'world'"),
        ("not a member", "ValueError", "this rank is not a member of process_group"),
    ],
)
def test_a_mistake_of_all_ranks(ranks, which, kind, message):
    for failure in ranks(wrong_on_rank, 2, which):
        assert failure.kind == kind and message in failure.message


def test_without_init_process_group():
    with pytest.raises(RuntimeError, match=r"needs torch.distributed.init_process_group\(\) first"):
        fast_matrix_entropy(Z, process_group="world")


def test_grad_scale_is_checked_without_a_group():
    with pytest.raises(ValueError, match=r"grad_scale must be one of .*, got 'avg'"):
        fast_matrix_entropy(Z, grad_scale="avg")
