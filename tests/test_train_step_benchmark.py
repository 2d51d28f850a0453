"""The benchmark of a training step: both sides compute the same, and a result is written."""

import json

import pytest
import torch

from benchmarks import train_step


def test_quick(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert train_step.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "train-step-cpu.json").read_text())
    assert set(result["steps"]) == {"published", "here"}
    for row in result["steps"].values():
        assert len(row["samples"]) == 2 and row["images_per_second"] > 0
    assert result["steps"]["published"]["speed_up"] == 1
    assert "images/s" in capsys.readouterr().out


def test_other_losses_are_not_timed(monkeypatch):
    monkeypatch.setattr(train_step, "MU", 2.0)
    ours = train_step.Ours(train_step.QUICK, torch.device("cpu"))
    monkeypatch.setattr(train_step, "MU", 1.0)
    published = train_step.Published(train_step.QUICK, torch.device("cpu"))
    images, labels = torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)
    with pytest.raises(SystemExit, match=r"regularizer: .* not comparable"):
        train_step.compare(published, ours, images, labels)
