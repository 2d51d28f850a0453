"""Images from the command line: packs, and models of oblong, grey, 16-bit images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmae_fast import cli
from mmae_fast.evaluation.config import AnalyzeConfig
from mmae_fast.evaluation.layers import load_images, open_checkpoint
from mmae_fast.training.config import DataConfig, from_dict, to_dict
from mmae_fast.training.data import load_data


def test_sizes_survive_json():
    config = DataConfig(img_size=(32, 64), value_range=(0.0, 4095.0))
    saved = json.loads(json.dumps(to_dict(config)))
    assert from_dict(DataConfig, saved) == config
    assert saved == to_dict(config)  # what a resumed run compares


def test_command_line(tmp_path, capsys):
    source = tmp_path / "images"
    for i in range(4):
        (source / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (i, i, i)).save(source / "ab"[i % 2] / f"{i}.png")
    out = tmp_path / "pack"
    cli.main(["data", "pack", str(source), str(out), "--img-size", "6", "9", "--in-chans", "1"])
    text = capsys.readouterr().out
    assert "4 images of 6x9, 1 channel, uint8" in text and "2 classes: a, b" in text
    cli.main(["data", "info", str(out)])
    assert "0 images skipped" in capsys.readouterr().out
    cli.main(["data", "verify", str(out)])
    assert "all checksums fit" in capsys.readouterr().out
    raw = (out / "images.u8").read_bytes()
    (out / "images.u8").write_bytes(raw[:-1] + b"\xff")
    with pytest.raises(SystemExit, match=r"mmae data: error: .*images\.u8 was altered"):
        cli.main(["data", "verify", str(out)])
    with pytest.raises(SystemExit, match="pack, info or verify, not 'unpack'"):
        cli.main(["data", "unpack", str(out)])
    cli.main(["data"])
    assert "usage: mmae data pack SOURCE DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "pack", "--help"])
    assert "usage: mmae data pack" in capsys.readouterr().out


def test_models_take_oblong_grey_packs_and_folders(tmp_path, capsys):
    """Trained, evaluated and analysed, all from the command line."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(6):
                image = Image.fromarray(rng.integers(0, 4096, (12, 20), dtype=np.uint16))
                image.save(tmp_path / "images" / part / name / f"{i}.png")
        arguments = ["--img-size", "10", "15", "--in-chans", "1", "--value-range", "0", "4095"]
        source, out = (str(tmp_path / kind / part) for kind in ("images", "packs"))
        cli.main(["data", "pack", source, out, *arguments])
    (tmp_path / "images" / "train" / "a" / "7.png").write_bytes(b"damaged")
    small = ["--model.patch-size", "4", "--model.embed-dim", "16", "--model.depth", "1"]
    small += ["--model.num-heads", "2", "--model.decoder-embed-dim", "8", "--batch-size", "4"]
    small += ["--model.decoder-num-heads", "2", "--device", "cpu", "--epochs", "1"]
    size = ["--data.img-size", "8", "12"]
    for kind in ("images", "packs"):
        options = ["--data.in-chans", "1", "--data.value-range", "0", "4095"]
        options = options if kind == "images" else []
        run, data = str(tmp_path / f"run-{kind}"), str(tmp_path / kind)
        cli.main(["pretrain", "--data.train", data, "--out", run, *size, *options, *small])
        described = json.loads((tmp_path / f"run-{kind}" / "config.json").read_text())["data"]
        assert (described["img_size"], described["in_chans"]) == ([8, 12], 1)
        skipped = tmp_path / f"run-{kind}" / "skipped.txt"
        assert skipped.exists() == (kind == "images")
        records = (tmp_path / f"run-{kind}" / "metrics.jsonl").read_text().splitlines()
        assert 0 < json.loads(records[-1])["data_wait_share"] < 1
        assert "waited for data" in capsys.readouterr().out
        cli.main(["knn", run, "--device", "cpu"])
    assert "7.png\tno image of a known format" in (tmp_path / "run-images/skipped.txt").read_text()
    analysis = ["--out", str(tmp_path / "analysis"), "--device", "cpu"]
    cli.main(["analyze", run, "--data", str(tmp_path / "images"), *analysis])
    assert (tmp_path / "analysis" / "analysis.json").exists()

    # Channels and range of values are those that the model was trained with.
    run = str(tmp_path / "run-images")
    config = AnalyzeConfig((run,), data=str(tmp_path / "images"))
    seen = load_images(open_checkpoint(run, config, torch.device("cpu")), config)
    told = DataConfig(config.data, None, (8, 12), in_chans=1, value_range=(0, 4095))
    assert torch.equal(seen, load_data(told)[1].images)
