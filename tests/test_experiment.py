"""The experiment's plumbing: runs, resumes, refuses; its page says what its numbers say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import experiment, experiment_page


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    rng = torch.Generator().manual_seed(0)
    for name, count in zip(experiment.FILES, (48, 32), strict=True):
        coarse = torch.rand(count, 3, 4, 4, generator=rng) * 255
        images = torch.nn.functional.interpolate(coarse, (32, 32)).to(torch.uint8)
        files = [encode_jpeg(image) for image in images]
        np.savez(
            folder / name,
            jpeg=torch.cat(files).numpy(),
            offset=np.cumsum([0, *map(len, files)]),
            label=np.arange(count) % 10,
            classes=np.array([f"class {i}" for i in range(10)]),
        )
    return folder


def command(cifar, tmp_path):
    out = ["--out", str(tmp_path / "docs" / "experiments"), "--runs", str(tmp_path / "runs")]
    return ["small", "--quick", "--device", "cpu", "--data", str(cifar), *out]


def test_a_quick_experiment(cifar, tmp_path, monkeypatch):
    assert experiment.main(command(cifar, tmp_path)) == 0
    out = tmp_path / "docs" / "experiments"
    content = json.loads((out / "small.json").read_text())
    methods = [result["method"] for result in content["results"]]
    assert methods == ["barlow_twins", "spectral", "mae", "u_mae", "m_mae"]
    for result in content["results"]:
        assert 0 <= result["linear_probe"] <= 1 and 0 <= result["knn"] <= 1
        assert [r["step"] for r in result["curves"]] == [0, 2, 4, 6]
        assert all("backbone_mutual_information_1" in r for r in result["curves"])
    for name in ("small-two-branch.png", "small-masked.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = out.with_name("experiments.md").read_text()
    assert "A quick run: its numbers mean nothing" in page
    assert "| M-MAE | 1 | 2 |" in page and "experiments/small-masked.png" in page
    assert "Not yet measured (made for one GPU)" in page
    assert str(tmp_path) not in page + (out / "small.json").read_text().replace(
        str(tmp_path / "r"), ""
    )

    # Finished runs are kept: nothing is trained or probed again.
    def never(*args):
        raise AssertionError("probed again")

    monkeypatch.setattr("mmae_fast.demo.probe", never)
    assert experiment.main(command(cifar, tmp_path)) == 0
    assert json.loads((out / "small.json").read_text())["results"] == content["results"]


def test_what_cannot_work(cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CIFAR", raising=False)
    assert experiment.main(["small"]) == 1
    assert "cifar10_train.npz and cifar10_test.npz, or 'download'" in capsys.readouterr().err
    assert experiment.main(["small", "--data", str(tmp_path)]) == 1
    assert "cifar10_train.npz and no" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiment.main(["small", "--quick", "--data", str(cifar)])
    assert "needs an --out of its own" in capsys.readouterr().err


def test_sentences_follow_the_numbers():
    def result(method, seed, probe):
        record = {"backbone_entropy_1": 1.0}
        record |= {
            f"projector_{k}_{a}": 2.0
            for k in ("mutual_information", "joint_entropy")
            for a in (1, 2)
        }
        later = record | {"projector_mutual_information_1": 3.0, "projector_joint_entropy_2": 1.0}
        return {
            "method": method,
            "seed": seed,
            "linear_probe": probe,
            "effective_rank": 5.0 + seed,
            "curves": [record, later],
        }

    results = [result("mae", s, 0.40) for s in range(2)]
    results += [result("m_mae", s, 0.38 + 0.02 * s) for s in range(2)]
    content = {
        "results": [result("spectral", 0, 0.3), *results],
        "raw_pixels": {"linear_probe": 0.5},
    }
    spectral, m_mae, scale = experiment_page.findings(content)
    assert "mutual information (α = 1) rises from 2.00 to 3.00" in spectral
    assert "joint entropy (α = 2) falls from 2.00 to 1.00" in spectral
    assert "M-MAE against MAE, seed by seed: linear probe -1.00 ± 1.41 points" in m_mae
    assert "40.00%, is not above that of the raw pixels, 50.00%" in scale
