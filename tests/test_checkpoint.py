"""Checkpoints: whole or absent, checked, safe to load; and runs that end as if never stopped."""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmae_fast.training import manifest
from mmae_fast.training.checkpoint import (
    checkpoints,
    damage,
    find_weights,
    intact_checkpoint,
    latest_checkpoint,
    load_model,
    restore,
    save_checkpoint,
)
from mmae_fast.training.config import ModelConfig, PretrainConfig, UserError, to_dict
from mmae_fast.training.data import ImageData
from mmae_fast.training.launch import World
from mmae_fast.training.models import build_model
from mmae_fast.training.runs import read_metrics
from mmae_fast.training.train import pretrain

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ALONE = World(CPU)
CONFIG = PretrainConfig(model=ModelConfig(4, 16, 1, 2, 8, 1, 2))
META = {"config": to_dict(CONFIG), "data": {"img_size": [8, 8], "in_chans": 1}}
FILES = ("model.safetensors", "training.safetensors", "manifest.json")


def state(seed=0):
    torch.manual_seed(seed)
    model = build_model(CONFIG, (8, 8), 1)
    return {"model": model.state_dict(), "training": {"sums": torch.rand(3), "n": torch.ones(())}}


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints of steps 1, 2 and 3, weights of seeds 1, 2 and 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step), META, 3, ALONE)
    return tmp_path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- Saving and loading --------------------------------------------------------------------------


def test_round_trip(run):
    into = state(7)
    assert restore(run, into, ALONE) == 3
    assert all(same(into[file], state(3)[file]) for file in into)
    model, meta = load_model(run, CPU)
    assert same(model.state_dict(), state(3)["model"]) and meta["step"] == 3


def test_the_newest_are_kept(run):
    save_checkpoint(run, 1000000, state(4), META, 2, ALONE)  # more digits than the others
    assert [folder.name for folder in checkpoints(run)] == ["step-1000000", "step-000003"]
    assert sorted(path.name for path in latest_checkpoint(run).iterdir()) == sorted(FILES)


def test_no_checkpoint_is_step_0(tmp_path):
    assert restore(tmp_path, state(), ALONE) == 0
    assert intact_checkpoint(tmp_path) is None


def test_tensors_of_another_training_are_refused(run):
    other = state()
    del other["training"]["n"]
    with pytest.raises(UserError, match=r"training\.safetensors holds other tensors"):
        restore(run, other, ALONE)


# --- Damage --------------------------------------------------------------------------------------


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - len(content) // 10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_passed_over(run, capsys, name, harm):
    harm(latest_checkpoint(run) / name)
    into = state(7)
    assert restore(run, into, ALONE) == 2
    assert same(into["model"], state(2)["model"])
    said = capsys.readouterr().err
    assert "Checkpoint step-000003 is damaged and not used" in said and str(run) in said
    assert find_weights(run).parent.name == "step-000002"
    with pytest.raises(UserError, match=r"step-000003"):
        load_model(latest_checkpoint(run), CPU)


def test_every_bit_of_the_weights_counts(run):
    """Also those that leave a readable file: flips spread over the whole of it."""
    folder = latest_checkpoint(run)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), 997):
        altered = bytearray(content)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        assert "altered" in damage(folder)
    path.write_bytes(content)
    assert damage(folder) is None


def test_all_damaged(run):
    for folder in checkpoints(run):
        truncate(folder / "training.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact: .* bytes instead of"):
        restore(run, state(), ALONE)


def test_a_damaged_checkpoint_is_written_anew(run):
    truncate(latest_checkpoint(run) / "model.safetensors")
    save_checkpoint(run, 3, state(3), META, 3, ALONE)
    assert damage(latest_checkpoint(run)) is None


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_is_not_opened(run, tmp_path, monkeypatch):
    """Neither beside a checkpoint's manifest, nor with one that fits it, nor alone."""
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Harmful()), _torch_pickle(tmp_path)):
        for name in FILES[:2]:
            folder = latest_checkpoint(run)
            (folder / name).write_bytes(content)
            (folder / "manifest.json").unlink()
            manifest.write_manifest(folder)
            with pytest.raises(UserError, match=f"{name} cannot be read"):
                restore(run, state(), ALONE)
            shutil.rmtree(folder)
            save_checkpoint(run, 3, state(3), META, 3, ALONE)
        alone = tmp_path / "weights.pth"
        alone.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.pth cannot be read"):
            load_model(alone, CPU)
    assert not (tmp_path / "harmed").exists()


def _torch_pickle(folder):
    torch.save(Harmful(), folder / "harmful.pt")
    return (folder / "harmful.pt").read_bytes()


# --- Disks ---------------------------------------------------------------------------------------


def check_that_nothing_is_lost(run, caught):
    assert "step-000003; --resume continues from it" in str(caught.value)
    assert [folder.name for folder in checkpoints(run)] == [f"step-00000{i}" for i in (3, 2, 1)]
    assert not list(run.glob("checkpoints/*.partial"))
    assert restore(run, state(), ALONE) == 3


@pytest.mark.parametrize("room", [1000, 20_000])
def test_no_room(run, room):
    """A file that may not grow: what a full disk does, at the first file or at the second."""
    big = state()
    big["training"]["more"] = torch.zeros(room)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (latest_checkpoint(run) / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100 if room > 1000 else 1000, most))
    try:
        with pytest.raises(UserError, match="the checkpoint of step 4 cannot be written") as caught:
            save_checkpoint(run, 4, big, META, 3, ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    check_that_nothing_is_lost(run, caught)


@pytest.mark.parametrize("call", ["flush", "write_manifest"])
def test_disk_that_fails_late(run, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, call, full)
        with pytest.raises(UserError, match="No space left on device") as caught:
            save_checkpoint(run, 4, state(4), META, 3, ALONE)
    check_that_nothing_is_lost(run, caught)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_full_and_read_only_disk(small_disk):
    for step in (1, 2, 3):
        save_checkpoint(small_disk, step, state(step), META, 3, ALONE)
    big = state(4)
    big["training"]["more"] = torch.zeros(100_000)
    with pytest.raises(UserError, match="No space left on device") as caught:
        save_checkpoint(small_disk, 4, big, META, 3, ALONE)
    check_that_nothing_is_lost(small_disk, caught)
    remount(small_disk, "ro")
    with pytest.raises(UserError, match="Read-only file system") as caught:
        save_checkpoint(small_disk, 4, state(4), META, 3, ALONE)
    check_that_nothing_is_lost(small_disk, caught)
    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    config = dataclasses.replace(CONFIG, out=small_disk / "run", batch_size=4, device="cpu")
    with pytest.raises(UserError, match=r"Read-only file system: '.*/run'"):
        pretrain(config, (ImageData(images, None, (), "made up"), None))


def test_disk_full_while_training(small_disk):
    """At a line of metrics, not at a checkpoint: an error that names both; then it goes on."""
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    data = ImageData(images, None, (), "made up"), None
    config = dataclasses.replace(
        CONFIG,
        out=small_disk / "run",
        epochs=20,
        batch_size=4,
        log_every=1,
        save_every=10,
        device="cpu",
    )
    filler = small_disk / "filler"
    task = FillsTheDisk(filler, at=21)
    with pytest.raises(UserError, match=r"No space left on device.*last checkpoint.*step-000020"):
        pretrain(config, data, task)
    assert damage(latest_checkpoint(config.out)) is None
    filler.unlink()
    pretrain(dataclasses.replace(config, resume=True), data, FillsTheDisk(filler, at=None))
    assert [r["step"] for r in read_metrics(config.out / "metrics.jsonl")] == list(range(41))


class FillsTheDisk:
    def __init__(self, filler, at):
        self.filler, self.at = filler, at

    def start(self, total, done=0):
        self.done = done

    def advance(self, units=1):
        self.done += units
        if self.done == self.at:
            # The last page of the metrics has room for some lines yet.
            with self.filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(10_000))

    def say(self, note):
        pass

    def tell(self, line):
        pass


# --- Killed and resumed --------------------------------------------------------------------------


def run_group(command, environment, timeout):
    """Exit status and output of a program that forks; none of its processes outlives it."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def kill_and_compare(folder, kills, steps, seed, ranks=1):
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(folder)]
    command += [str(number) for number in (kills, steps, seed, ranks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    status, said = run_group(command, environment, timeout=60 + 60 * kills)
    assert status == 0 and said.endswith(f"{kills} killed\n"), said
    whole, killed = folder / "whole", folder / "killed"
    assert [c.name for c in checkpoints(whole)] == [c.name for c in checkpoints(killed)]
    assert not list(killed.glob("checkpoints/*.partial"))
    for name in ("model", "ema", "training"):
        a, b = (
            load_file(latest_checkpoint(run) / f"{name}.safetensors") for run in (whole, killed)
        )
        assert same(a, b), name
    timings = {"images_per_second", "regularizer_share", "data_wait_share"}
    timings.add("epoch_data_wait_share")
    a, b = (
        [
            {k: v for k, v in r.items() if k not in timings}
            for r in read_metrics(f / "metrics.jsonl")
        ]
        for f in (whole, killed)
    )
    assert a == b and a[-1]["step"] == steps


def test_killed_and_resumed_is_bitwise_the_same(tmp_path):
    kill_and_compare(tmp_path, kills=3, steps=150, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    kill_and_compare(tmp_path, kills=20, steps=1200, seed=1)


@pytest.mark.slow
def test_two_processes_killed(tmp_path):
    """Sums of two numbers do not depend on their order, so that this too is bitwise."""
    kill_and_compare(tmp_path, kills=5, steps=600, seed=2, ranks=2)


def test_manifest_lists_what_is_there(run):
    listed = json.loads((latest_checkpoint(run) / "manifest.json").read_text())["files"]
    assert sorted([*listed, "manifest.json"]) == sorted(FILES)
