"""Training by several processes, in parts, and sharded: the same as by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmae_fast.checkpoint import latest_checkpoint
from mmae_fast.runs import read_metrics

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WAYS = {
    "alone": {"ranks": 1},
    "two": {"ranks": 2},
    "four": {"ranks": 4},
    "sharded": {"ranks": 2, "shard": True},
    "parts": {"ranks": 1, "accumulate": 4},
    "two_in_parts": {"ranks": 2, "accumulate": 2},
    "sharded_in_parts": {"ranks": 2, "accumulate": 2, "shard": True},
}


def together(folder, ways):
    """What the trainings said."""
    runs = [way | {"out": str(folder / name)} for name, way in ways.items()]
    command = [sys.executable, str(ROOT / "tests" / "together.py"), json.dumps(runs)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    said = together(folder, WAYS)
    for name, way in WAYS.items():
        assert f"{name}{' 0' * way['ranks']}\n" in said, said
    return folder


@pytest.mark.parametrize("way", [name for name in WAYS if name != "alone"])
def test_the_loss_curve_is_that_of_one_process(runs, way):
    alone, other = (read_metrics(runs / name / "metrics.jsonl") for name in ("alone", way))
    assert len(alone) == len(other) == 51
    first = alone[1]
    assert first["regularizer"] < -0.1  # a part of the loss that would show
    for a, b in zip(alone, other, strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "recon_loss", "regularizer", "effective_rank"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    assert alone[-1]["loss"] < first["loss"] - 0.01  # it learned something


@pytest.mark.parametrize("way", [name for name in WAYS if name != "alone"])
@pytest.mark.parametrize("file", ["model", "ema", "training"])
def test_the_files_are_those_of_one_process(runs, way, file):
    """Whole tensors under the same names, whoever wrote them."""
    a, b = (
        load_file(latest_checkpoint(runs / name) / f"{file}.safetensors") for name in ("alone", way)
    )
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        if name.endswith("qkv.bias") and "step" not in name:
            # The softmax does not see the bias of the keys: its gradient is rounding, whose sign
            # AdamW turns into whole steps.
            for tensor in (a[name], b[name]):
                tensor.view(3, -1)[1].zero_()
        assert (a[name] - b[name]).abs().max() <= 1e-3 * a[name].abs().max(), name
