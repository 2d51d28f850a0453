"""Training by several processes, in parts, and sharded: the same as by one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmae_fast.training.checkpoint import damage, latest_checkpoint
from mmae_fast.training.runs import read_config, read_metrics
from mmae_fast.training.train import Interrupted, pretrain

from .test_checkpoint import run_group

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WAYS = {
    "alone": {"ranks": 1},
    "two": {"ranks": 2},
    "four": {"ranks": 4},
    "sharded": {"ranks": 2, "shard": True},
    "parts": {"ranks": 1, "accumulate": 4},
    "two_in_parts": {"ranks": 2, "accumulate": 2},
}


class Task:
    """Stops the training after a step."""

    def __init__(self, stop_after):
        self.stop_after = stop_after

    def start(self, total, done=0):
        self.done = done

    def advance(self, units=1):
        self.done += units
        if self.done == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def say(self, note):
        pass

    def tell(self, line):
        pass


def train_together(folder, ways, timeout=600):
    """What the trainings said."""
    runs = [way | {"out": str(folder / name)} for name, way in ways.items()]
    command = [sys.executable, str(ROOT / "tests" / "together.py"), json.dumps(runs)]
    return run_group(command, ENVIRONMENT, timeout)[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    said = train_together(folder, WAYS)
    for name, way in WAYS.items():
        assert f"{name}{' 0' * way['ranks']}\n" in said, said
    return folder


@pytest.mark.parametrize("way", [name for name in WAYS if name != "alone"])
def test_the_loss_curve_is_that_of_one_process(runs, way):
    alone, other = (read_metrics(runs / name / "metrics.jsonl") for name in ("alone", way))
    assert len(alone) == len(other) == 26
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


COMPILED = {
    "ddp": {},
    "sharded": {"shard": True},
    "two_branch": {
        "loss": {"method": "simclr"},
        "two_branch": {"projector_hidden": 24, "projector_dim": 12},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", COMPILED)
def test_compiled(tmp_path, way):
    """--compile changes rounding only, under DDP and FSDP2 too, and captures each block whole."""
    changes = {"ranks": 2, "epochs": 4, "log_every": 1, "monitor_every": 0} | COMPILED[way]
    said = train_together(
        tmp_path, {"eager": changes, "compiled": changes | {"compile": True}}, timeout=1200
    )
    assert "eager 0 0\n" in said and "compiled 0 0\n" in said, said
    kinds = 1 if way == "two_branch" else 2  # of blocks: the encoder's and the decoder's
    for rank in (0, 1):
        assert f"rank {rank} compiled {kinds} graphs, 0 breaks\n" in said, said
    eager, compiled = (
        read_metrics(tmp_path / name / "metrics.jsonl")[1:] for name in ("eager", "compiled")
    )
    assert len(eager) == len(compiled) == 8
    for a, b in zip(eager, compiled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]


# --- torchrun ------------------------------------------------------------------------------------


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mmae_fast.cli", "pretrain", "--data.train", "digits", "--device", "cpu"]
    command += ["--model.patch-size", "4", "--model.depth", "1", "--model.embed-dim", "16"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def test_sigterm_under_torchrun(tmp_path):
    """All receive it, as from Slurm, and the agent passes it on: one checkpoint, to be resumed."""
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    options = ["--epochs", 400, "--log-every", 1, "--monitor-every", 0]
    process = torchrun("--out", out, "--shard", *options)
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(out / "metrics.jsonl")) < 3 and process.poll() is None:
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert said.count("--resume continues") == 1, said
    assert "First step done" in said
    checkpoint = latest_checkpoint(out)
    assert damage(checkpoint) is None
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped after step {step}" in said and 2 <= step < 2000

    config = dataclasses.replace(read_config(out), out=out, resume=True, shard=False)
    with pytest.raises(Interrupted, match=f"stopped after step {step + 2}"):
        pretrain(config, task=Task(stop_after=step + 2))


def test_errors_of_all_and_of_one(tmp_path):
    ways = {
        "uneven": {"ranks": 2, "batch_size": 15},
        "blocked": {"ranks": 2},  # a file where the run should be: the main process alone sees it
    }
    (tmp_path / "blocked").touch()
    said = train_together(tmp_path, ways)
    for name in ways:
        assert f"{name} 1 1\n" in said, said
    assert said.count("batch_size 15 cannot be shared evenly by 2 processes") == 2
    for rank in (0, 1):
        line = next(line for line in said.splitlines()[::-1] if line.startswith(f"rank {rank}"))
        assert "blocked" in line
