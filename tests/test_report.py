"""The report: figures that are pictures, a page that stands alone, sentences that say the truth."""

import json
import re

import pytest
import torch

from mmae_fast.evaluation.page import findings, format_cell, summarise
from mmae_fast.evaluation.report import write_report
from mmae_fast.training.reconstruct import save_reconstructions

PNG = b"\x89PNG\r\n\x1a\n"


def result(method, seed=0, linear_probe=0.8, **changes):
    values = {
        "method": method,
        "seed": seed,
        "run": f"{method}-seed{seed}",
        "linear_probe": linear_probe,
        "knn": 0.7,
        "effective_rank": 3.0,
        "images_per_second": 1234.0,
        "regularizer_share": 0.01,
        "spectrum": [0.7, 0.2, 0.1],
    }
    return values | changes


def demo(*results, seeds=1):
    return {
        "lead": "Lead <with> markup.",
        "results": list(results),
        "raw_pixels": {"linear_probe": 0.84, "knn": 0.83, "effective_rank": 2.5},
        "seeds": seeds,
        "embed_dim": 128,
        "test_images": 10_000,
        "held_out": 512,
        "protocol": "Protocol.",
        "settings": {"data": "made up"},
        "versions": {"torch": "2.x", "gpu": None},
        "command": "mmae demo --seeds 1",
    }


@pytest.fixture
def folder(tmp_path):
    content = demo(
        result("mae", linear_probe=0.7912), result("u_mae"), result("m_mae", effective_rank=9.5)
    )
    (tmp_path / "demo.json").write_text(json.dumps(content))
    for entry in content["results"]:
        run = tmp_path / entry["run"]
        run.mkdir()
        records = [{"step": 0, "epoch": 0.0, "matrix_entropy": 0.1, "effective_rank": 1.1}]
        records += [
            {
                "step": step,
                "epoch": step / 10,
                "loss": 1 / step,
                "recon_loss": 1 / step,
                "regularizer": 0.0,
                "matrix_entropy": 0.2,
                "effective_rank": 1.2,
            }
            for step in (10, 20)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    images = torch.rand(4, 1, 6, 6)
    masked = images.masked_fill(torch.rand_like(images) > 0.5, float("nan"))
    save_reconstructions(tmp_path / "reconstructions.png", images, masked, {"MAE": images}, 0.75)
    return tmp_path


def test_write_report(folder):
    page = write_report(folder).read_text()
    for name in ("entropy", "loss", "spectrum", "reconstructions"):
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(PNG) and len(content) > 5000
    assert page.count("data:image/png;base64,") == 4
    # Self-contained: nothing is fetched, from here or from elsewhere.
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    words = re.sub(r"base64,[^\"]*", "", page)
    assert "http" not in words and "url(" not in words
    assert "Lead &lt;with&gt; markup." in page
    rows = re.findall(r"<tr><th><span.*?</tr>", page)
    assert [re.sub("<.*?>", " ", row).split() for row in rows] == [
        ["MAE", "79.12%", "70.00%", "3.00", "1,234", "1.00%"],
        ["U-MAE", "80.00%", "70.00%", "3.00", "1,234", "1.00%"],
        ["M-MAE", "80.00%", "70.00%", "9.50", "1,234", "1.00%"],
    ]
    assert "84.00%" in words and "One seed." in words
    assert "gpu" not in words


def test_best_accuracies_are_marked(folder):
    page = write_report(folder).read_text()
    assert page.count('class="best">80.00%') == 2
    assert 'class="best">79.12%' not in page


@pytest.mark.parametrize(
    "m_mae, words",
    [
        (0.83, "M-MAE is 3.00 points ahead of MAE, with one seed. That is more than the ±1.11"),
        (0.80, "M-MAE is level with MAE, with one seed. That is within the ±1.11"),
        (0.79, "M-MAE is 1.00 points behind MAE, with one seed. That is within the ±1.11"),
    ],
)
def test_findings_say_who_is_ahead(m_mae, words):
    said = " ".join(findings(demo(result("mae"), result("m_mae", linear_probe=m_mae))))
    assert words in said
    assert "how much" not in said and "not measured" in said


def test_findings_compare_with_raw_pixels():
    behind = " ".join(findings(demo(result("mae"), result("m_mae"))))
    assert "No method here beats that" in behind
    ahead = " ".join(findings(demo(result("mae"), result("m_mae", linear_probe=0.9))))
    assert "do better than that" in ahead


def test_several_seeds_are_averaged():
    results = [result("mae", seed, 0.80 + 0.01 * seed) for seed in range(3)]
    results += [result("m_mae", seed, 0.85) for seed in range(3)]
    table = summarise(results)
    assert list(table) == ["mae", "m_mae"]
    assert table["mae"]["linear_probe"] == pytest.approx((0.81, 0.01))
    assert format_cell("{:.2%}", table["mae"]["linear_probe"]) == "81.00% ± 1.00%"
    assert format_cell("{:.2f}", (3.0, 0.0)) == "3.00"
    said = " ".join(findings(demo(*results, seeds=3)))
    assert "4.00 points ahead of MAE, with 3 seeds" in said and "in the table" in said


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_reconstructions_of_any_channels(tmp_path, channels):
    images = torch.rand(2, channels, 6, 8)
    masked = images.clone()
    masked[..., :4] = float("nan")
    path = tmp_path / "new" / "r.png"
    save_reconstructions(path, images, masked, {"model": images}, 0.5)
    assert path.read_bytes().startswith(PNG)
