"""Packs: written once, continued where they were interrupted, checked, memory-mapped."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmae_fast.training.config import DataConfig, PackConfig, UserError
from mmae_fast.training.data import load_data, packed
from mmae_fast.training.data.packed import open_pack, read_manifest, verify_pack, write_pack


def image_folder(root, count=10, size=(8, 12)):
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / ("ant" if i < count // 2 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def source(tmp_path):
    return image_folder(tmp_path / "images")


@pytest.fixture
def config(tmp_path, source):
    return PackConfig(str(source), tmp_path / "pack")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed, "BLOCK_BYTES", 3 * 8 * 12 * 3)  # three images


def test_a_pack_holds_what_the_folder_holds(config, source, small_blocks):
    expected, _ = load_data(DataConfig(train=str(source)))
    pack = open_pack(write_pack(config))
    assert torch.equal(pack.images, expected.images)
    assert torch.equal(pack.labels, expected.labels)
    assert pack.classes == ("ant", "bee") and pack.stats() == expected.stats()
    assert str(source) in pack.origin and "checksums verified" in pack.origin
    assert len(read_manifest(config.out)["blocks"]) == 4
    assert sorted(os.listdir(config.out)) == [
        "images.u8", "labels.i64", "manifest.json", "skipped.txt"
    ]  # fmt: skip
    with pytest.raises(UserError, match="pack exists"):
        write_pack(config)


def test_pack_of_a_built_in_set(tmp_path):
    pytest.importorskip("sklearn")
    out = write_pack(PackConfig("digits", tmp_path / "test", split="test"))
    _, expected = load_data(DataConfig(train="digits"))
    assert torch.equal(open_pack(out).images, expected.images)
    assert torch.equal(open_pack(out).labels, expected.labels)


def test_training_finds_the_packs_of_both_parts(tmp_path):
    for part in ("train", "val"):
        image_folder(tmp_path / "images" / part, count=6)
        write_pack(
            PackConfig(str(tmp_path / "images" / part), tmp_path / "packs" / part, img_size=10)
        )
    for train in (tmp_path / "packs", tmp_path / "packs" / "train"):
        train, test = load_data(DataConfig(train=str(train)))
        assert len(train) == len(test) == 6 and train.img_size == (10, 10)
    # --split chooses a part of a folder of parts
    out = write_pack(PackConfig(str(tmp_path / "images"), tmp_path / "v", split="val"))
    assert open_pack(out).classes == ("ant", "bee")
    with pytest.raises(UserError, match="is a pack already"):
        write_pack(PackConfig(str(out), tmp_path / "again"))
    with pytest.raises(UserError, match="absent is missing"):
        write_pack(PackConfig(str(tmp_path / "absent"), tmp_path / "again"))


def test_mapped_images_give_no_warning(config, recwarn):
    open_pack(write_pack(config))
    assert not recwarn.list


def test_crops_come_from_a_larger_pack(tmp_path, config):
    write_pack(dataclasses.replace(config, img_size=(10, 15)))
    data, _ = load_data(DataConfig(train=str(config.out), img_size=(8, 12)))
    assert data.img_size == (8, 12) and data.crop_source.shape == (10, 3, 10, 15)
    assert torch.equal(data.images, data.crop_source[:, :, 1:9, 1:13])
    same, _ = load_data(DataConfig(train=str(config.out)))
    assert same.uncropped is None and data.stats() == same.stats()
    for size in (16, (4, 12)):
        with pytest.raises(UserError, match=r"packed at 10x15 .*needs a pack of that size"):
            load_data(DataConfig(train=str(config.out), img_size=size))
    with pytest.raises(UserError, match=r"has images of 10x15 with 3 channels, asked .* 1 chan"):
        load_data(DataConfig(train=str(config.out), in_chans=1))


def test_damaged_images_are_skipped(config, source, small_blocks, capsys):
    (source / "ant" / "00.png").write_bytes(b"first")
    (source / "ant" / "03.png").write_bytes(b"within")
    (source / "bee" / "09.png").write_bytes(b"last")
    out = write_pack(config)
    assert "Skipped 3 of 10 images" in capsys.readouterr().out
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["ant/00.png", "ant/03.png", "bee/09.png"]
    pack = open_pack(out)
    assert pack.labels.tolist() == [0] * 3 + [1] * 4
    expected, _ = load_data(DataConfig(train=str(source)))
    assert torch.equal(pack.images, expected.images)
    strict = dataclasses.replace(config, out=config.out.with_name("other"), strict=True)
    with pytest.raises(UserError, match=r"ant/00\.png cannot be decoded"):
        write_pack(strict)


# --- Interruptions -------------------------------------------------------------------------------


def interrupt(config, monkeypatch, after):
    """Stop while a block is being written."""
    append, written = packed._append, []

    def failing(images, *rest):
        if len(written) == after:
            images.write(b"half a block")
            images.flush()
            raise KeyboardInterrupt
        append(images, *rest)
        written.append(None)

    with monkeypatch.context() as patch:
        patch.setattr(packed, "_append", failing)
        with pytest.raises(KeyboardInterrupt):
            write_pack(config)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_pack_goes_on(
    config, source, small_blocks, monkeypatch, tmp_path, capsys, after
):
    (source / "ant" / "01.png").write_bytes(b"damaged")
    whole = write_pack(dataclasses.replace(config, out=tmp_path / "whole"))
    interrupt(config, monkeypatch, after)
    assert not config.out.exists()
    decoded, decode = [], packed.decode_all

    def noted(source, spec, start):
        decoded.append(start)
        return decode(source, spec, start)

    monkeypatch.setattr(packed, "decode_all", noted)
    write_pack(config)
    assert ("Going on after" in capsys.readouterr().out) == (after > 0)
    assert decoded == [{0: 0, 1: 4, 2: 7}[after]]
    for name in ("images.u8", "labels.i64", "skipped.txt"):
        assert (config.out / name).read_bytes() == (whole / name).read_bytes()
    first, second = read_manifest(config.out), read_manifest(whole)
    assert first == second
    verify_pack(config.out)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("last", ["_write_manifest", "rename"])
def test_an_interruption_at_the_end(config, source, monkeypatch, labelled, last):
    flat = dataclasses.replace(config, source=config.source if labelled else str(source / "ant"))

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((packed, last) if last.startswith("_") else (os, last)), fail)
        with pytest.raises(KeyboardInterrupt):
            write_pack(flat)
    assert not config.out.exists()
    pack = open_pack(write_pack(flat))
    verify_pack(config.out)
    assert len(pack) == (10 if labelled else 5) and (pack.labels is not None) == labelled
    assert (config.out / "labels.i64").exists() == labelled
    assert not (config.out / "progress.json").exists()


def test_an_interrupted_pack_is_not_continued_with_something_else(
    config, source, small_blocks, monkeypatch
):
    interrupt(config, monkeypatch, 1)
    with pytest.raises(UserError, match="begun with other options"):
        write_pack(dataclasses.replace(config, in_chans=1))
    (source / "bee" / "09.png").unlink()
    with pytest.raises(UserError, match="or the images have changed"):
        write_pack(config)


def test_two_processes_do_not_write_one_pack(config, small_blocks, monkeypatch):
    interrupt(config, monkeypatch, 1)
    with (config.out.with_name("pack.partial") / "images.u8").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            write_pack(config)
    write_pack(config)


def test_killed_packs_go_on(tmp_path, config, source):
    """By SIGKILL, wherever that hits."""
    image_folder(source, count=200)
    whole = write_pack(dataclasses.replace(config, out=tmp_path / "whole"))
    code = (
        "import os, sys, threading, time\n"
        "from pathlib import Path\n"
        "from mmae_fast.training.config import PackConfig\n"
        "from mmae_fast.training.data import packed\n"
        f"packed.BLOCK_BYTES = {3 * 8 * 12 * 7}\n"
        "append = packed._append\n"
        "def dying(*args):\n"
        "    if args[3].count >= 70:\n"
        "        threading.Thread(target=lambda: os.kill(os.getpid(), 9)).start()\n"
        "    append(*args)\n"
        "packed._append = dying\n"
        "packed.write_pack(PackConfig(sys.argv[1], Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", code, str(source), str(config.out)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -9
    partial = config.out.with_name("pack.partial")
    assert json.loads((partial / "progress.json").read_text())["count"] >= 70
    packed_blocks = packed.BLOCK_BYTES
    try:
        packed.BLOCK_BYTES = 3 * 8 * 12 * 7
        write_pack(config)
    finally:
        packed.BLOCK_BYTES = packed_blocks
    assert (config.out / "images.u8").read_bytes() == (whole / "images.u8").read_bytes()
    verify_pack(config.out)


# --- Damage --------------------------------------------------------------------------------------


def flip_bit(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_truncated_images(config):
    file = write_pack(config) / "images.u8"
    file.write_bytes(file.read_bytes()[:-1])
    for check in (open_pack, verify_pack):
        with pytest.raises(
            UserError, match=r"images\.u8 is truncated: 2,879 bytes, expected 2,880"
        ):
            check(config.out)


def test_altered_images(config, small_blocks, monkeypatch):
    flip_bit(write_pack(config) / "images.u8", 4 * 288 + 5)
    for check in (open_pack, verify_pack):
        with pytest.raises(UserError, match=r"images\.u8 was altered: images 3 to 5 do not fit"):
            check(config.out)
    monkeypatch.setattr(packed, "VERIFY_BYTES", 100)  # too large to be read at every start
    assert "sizes verified" in open_pack(config.out).origin


@pytest.mark.parametrize("name", ["labels.i64", "skipped.txt", "manifest.json"])
def test_other_altered_files(config, source, name):
    (source / "ant" / "01.png").write_bytes(b"damaged")
    out = write_pack(config)
    if name == "manifest.json":
        (out / name).write_text((out / name).read_text().replace('"bee"', '"cow"'))
    else:
        flip_bit(out / name, 0)
    for check in (open_pack, verify_pack):
        with pytest.raises(UserError, match=rf"{name} was altered"):
            check(out)


def test_missing_and_damaged_files(config):
    out = write_pack(config)
    content = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(content[:-20])
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_pack(out)
    (out / "manifest.json").write_text(content.replace("pack 1", "pack 2"))
    with pytest.raises(UserError, match="of format 'mmae_fast pack 2'"):
        open_pack(out)
    (out / "manifest.json").write_text(content)
    (out / "labels.i64").unlink()
    with pytest.raises(UserError, match=r"labels\.i64 is missing"):
        open_pack(out)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no pack: it has no manifest\.json"):
        verify_pack(out)


# --- Memory --------------------------------------------------------------------------------------


def test_a_pack_larger_than_the_memory(tmp_path):
    """Opening and batches of a pack of twice the machine's memory (a hole in a file)."""
    out = tmp_path / "pack"
    out.mkdir()
    shape = [3, 512, 512]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = 2 * memory // (3 * 512 * 512)
    with (out / "images.u8").open("wb") as file:
        file.truncate(count * 3 * 512 * 512)
    content = {"format": packed.FORMAT, "count": count, "shape": shape, "classes": []}
    content |= {"origin": "a hole", "files": {}, "block_images": count, "blocks": []}
    content["histogram"] = [[count * 512 * 512] + [0] * 255] * 3
    content["manifest"] = packed._sha256(json.dumps(content).encode())
    (out / "manifest.json").write_text(json.dumps(content))
    code = (
        "import sys, torch, resource\n"
        "from pathlib import Path\n"
        "from mmae_fast.training.augment import Batches\n"
        "from mmae_fast.training.config import PretrainConfig\n"
        "from mmae_fast.training.data.packed import open_pack\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = open_pack(Path(sys.argv[1]))\n"
        "mean, std = map(torch.tensor, data.stats())\n"
        "batches = Batches(data.images, mean, std, PretrainConfig(batch_size=4))\n"
        "for step in range(3): batches(step)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 300  # MiB


def test_packing_needs_memory_for_a_block_only(monkeypatch, tmp_path, source):
    """Few decoded images wait for the writer, however many there are."""
    waiting, most = 0, 0
    from mmae_fast.training.data import reading

    decode = reading.decode

    def counted(*args):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return decode(*args)

    monkeypatch.setattr(reading, "decode", counted)
    found = packed.open_source(str(image_folder(source, count=200)))
    for _ in reading.decode_all(found, reading.make_spec(found, None, None, None)):
        waiting -= 1
    assert most <= 8 * os.cpu_count() + 1
