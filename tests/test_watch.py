"""What a training shows: metrics where they were asked for, lines, reconstructions, a profile."""

import dataclasses
import io
import json
import re
import sys
import types

import pytest
import torch
from rich.console import Console

from mmae_fast.training.config import LossConfig, ModelConfig, PretrainConfig, UserError
from mmae_fast.training.data import ImageData
from mmae_fast.training.progress import Board
from mmae_fast.training.runs import read_metrics, read_run
from mmae_fast.training.train import pretrain


@pytest.fixture
def data():
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    return ImageData(pixels, None, (), "made up"), None


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        model=ModelConfig(4, 16, 1, 2, 8, 1, 2),
        out=tmp_path / "run",
        epochs=4,
        warmup_epochs=1,
        batch_size=8,
        log_every=5,
        monitor_every=10,
        device="cpu",
    )


def show(config, data, terminal=False, **options):
    """What is printed."""
    file = io.StringIO()
    with Board(Console(file=file, force_terminal=terminal, width=300)) as board:
        pretrain(config, data, board.task("M-MAE"), **options)
    return file.getvalue()


def test_plain_lines_where_there_is_no_terminal(config, data):
    said = show(config, data, began=0.0)
    lines = said.splitlines()
    assert re.fullmatch(r"First step done [\d.]+ s after the command", lines[0])
    epochs = [line for line in lines if re.match(r"M-MAE, epoch \d of 4: waited for data \d", line)]
    lines = [line for line in lines if line not in epochs]
    assert len(epochs) == 4 and len(lines) == 5
    for line in lines[1:]:
        assert re.match(
            r"M-MAE \d+/20: loss -?\d+\.\d+, effective rank \d+\.\d, [\d,]+ img/s, "
            r"waited for data \d+\.\d%.*; \d+:\d\d left",
            line,
        ), line


def test_bars_on_a_terminal(config, data):
    said = show(config, data, terminal=True)
    assert "effective rank" in said and "img/s" in said and "100%" in said


def test_reconstructions(config, data):
    show(dataclasses.replace(config, reconstruct_every=2), data)
    pictures = sorted(path.name for path in (config.out / "reconstructions").iterdir())
    assert pictures == ["step-000010.png", "step-000020.png"]
    assert (config.out / "reconstructions" / pictures[0]).read_bytes().startswith(b"\x89PNG")


def test_two_branches_reconstruct_nothing(config, data):
    config = dataclasses.replace(config, loss=LossConfig("simclr"), reconstruct_every=1)
    with pytest.raises(UserError, match="reconstruct_every is for masked autoencoders"):
        pretrain(config, data)


def test_profile(config, data, capsys):
    show(dataclasses.replace(config, profile=True), data)
    table = capsys.readouterr().out
    rows = dict(re.findall(r"(\w+) +│ +[\d.]+ │ +([\d.]+)%", table))
    assert list(rows) == ["data", "forward", "loss", "backward", "optimizer", "rest", "whole"]
    parts = [float(share) for name, share in rows.items() if name != "whole"]
    assert sum(parts) == pytest.approx(100, abs=0.5) and min(parts) >= 0
    trace = json.loads((config.out / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"forward", "backward", "optimizer"} <= names


def test_profile_of_parts(config, data, capsys):
    show(dataclasses.replace(config, profile=True, accumulate=2), data)
    rows = re.findall(r"(\w+) +│ +[\d.]+ │", capsys.readouterr().out)
    assert rows == ["data", "parts", "optimizer", "rest", "whole"]


def test_profile_of_a_run_that_is_too_short(config, data, capsys):
    show(dataclasses.replace(config, profile=True, epochs=2), data)
    assert "--profile needs 16 steps, this run has 10" in capsys.readouterr().err
    assert not (config.out / "trace.json").exists()


# --- TensorBoard and Weights & Biases ------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package(config, data, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--{name} needs .*: pip install {name}"):
        pretrain(dataclasses.replace(config, **{name: True}), data)
    assert not config.out.exists()


def module(monkeypatch, name, **content):
    fake = types.ModuleType(name)
    fake.__spec__ = types.SimpleNamespace(name=name)
    for key, value in content.items():
        setattr(fake, key, value)
    monkeypatch.setitem(sys.modules, name, fake)


def test_tensorboard(config, data, monkeypatch):
    """The calls that SummaryWriter gets. (The package itself is no dependency of the tests.)"""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            calls.append("closed")

    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    show(dataclasses.replace(config, tensorboard=True), data)
    assert calls[0] == (str(config.out / "tensorboard"), 0) and calls[-1] == "closed"
    written = {(name, step): value for name, value, step in calls[1:-1]}
    for record in read_metrics(config.out / "metrics.jsonl"):
        for name in record:
            assert written[name, record["step"]] == record[name]
    calls.clear()
    show(dataclasses.replace(config, tensorboard=True, resume=True), data)
    assert calls[0] == (str(config.out / "tensorboard"), 21)


def test_wandb(config, data, monkeypatch):
    calls = []

    class Run:
        def log(self, record, step):
            calls.append((step, record))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    module(monkeypatch, "wandb", init=init)
    show(dataclasses.replace(config, wandb=True), data)
    options, *logged, end = calls
    assert options["id"] == read_run(config.out)["id"] and options["resume"] == "allow"
    assert options["config"]["batch_size"] == 8
    assert logged == [(r["step"], r) for r in read_metrics(config.out / "metrics.jsonl")]
    assert end == "finished"
    calls.clear()
    show(dataclasses.replace(config, wandb=True, resume=True), data)
    assert calls[0]["id"] == options["id"]
