"""``mmae report``: any runs on one page, from what lies in their folders, or evaluated first."""

import json
import re

import pytest

from mmae_fast import cli
from mmae_fast.evaluation.compare import group, read

pytest.importorskip("sklearn")
SMALL = ["--model.patch-size", "2", "--model.embed-dim", "16", "--model.depth", "1"]
SMALL += ["--model.num-heads", "2", "--model.decoder-embed-dim", "8"]
SMALL += ["--model.decoder-num-heads", "2", "--device", "cpu"]


def mmae(*arguments):
    cli.main([str(argument) for argument in arguments])


def pretrain(out, *arguments):
    command = ["pretrain", "--data.train", "digits", "--out", out, "--epochs", "1", *SMALL]
    mmae(*command, "--log-every", "2", *arguments)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        pretrain(folder / "mae0", "--method", "mae"),
        pretrain(folder / "mae1", "--method", "mae", "--seed", "1"),
        pretrain(folder / "one", "--loss.mu", "1"),
        pretrain(folder / "three", "--loss.mu", "3"),
    ]


def table(page):
    rows = re.findall(r"<tr><th><span.*?</tr>", page)
    return [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", re.sub("</?span.*?>", "", row)) for row in rows]


def test_groups(runs):
    read_runs = [read(run) for run in runs]
    assert group(read_runs) == ["mae", "mae", "M-MAE, mu=1", "M-MAE, mu=3"]
    assert group(read_runs[2:3]) == ["m_mae"]


def test_page_of_what_is_there(runs, tmp_path, capsys):
    """Nothing is computed: what was not measured is a dash."""
    cli_out = tmp_path / "page"
    mmae("knn", runs[2], "--device", "cpu")
    mmae("knn", runs[3], "--device", "cpu", "--max-train", "100")  # not the protocol of the run
    mmae("report", *runs, "--out", cli_out)
    assert f"Report: {cli_out / 'report.html'}" in capsys.readouterr().out
    page = (cli_out / "report.html").read_text()
    rows = table(page)
    assert [row[0] for row in rows] == ["MAE", "M-MAE, mu=1", "M-MAE, mu=3"]
    accuracy = json.loads((runs[2] / "knn_cls.json").read_text())["accuracy"]
    assert [row[1:4] for row in rows] == [
        ["–", "–", "–"],
        ["–", f"{accuracy:.2%}", "–"],
        ["–", "–", "–"],
    ]
    assert all(re.fullmatch(r"[\d,]+( ± [\d,]+)?", row[4]) for row in rows)  # img/s
    assert "Not probed: MAE; M-MAE, mu=1; M-MAE, mu=3." in page
    assert "linear probe (LARS)" not in page and "fine-tuning" not in page
    assert page.count("data:image/png;base64,") == 2  # entropy, loss
    assert not list(runs[0].glob("result.json"))
    # Self-contained, and not the page of the demo.
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "4 runs compared" in page and "demonstration" not in page
    content = json.loads((cli_out / "report.json").read_text())
    assert content["settings"]["mu"] == "1 | 3" and content["settings"]["width"] == "16"


def test_page_of_evaluated_runs(runs, tmp_path):
    out = tmp_path / "page"
    mmae("probe", runs[0], "--device", "cpu", "--protocol", "lars", "--epochs", 12)
    mmae("report", *runs[:3], "--out", out, "--evaluate", "--device", "cpu")
    page = (out / "report.html").read_text()
    mae, m_mae = table(page)
    assert mae[0] == "MAE" and m_mae[0] == "M-MAE"
    assert re.fullmatch(r"[\d.]+% ± [\d.]+%", mae[1]) and re.fullmatch(r"[\d.]+%", m_mae[1])
    assert (mae[2], m_mae[2]) == ("–", "–")  # LARS: of one of the two seeds only
    assert page.count("data:image/png;base64,") == 4
    assert "linear probe (LARS)" in page and "2 seeds" in page
    saved = json.loads((runs[0] / "result.json").read_text())
    assert saved["test_images"] == 359 and 0 < saved["linear_probe"] < 1
    # A second page takes what is there.
    marked = saved | {"linear_probe": 0.4321}
    (runs[0] / "result.json").write_text(json.dumps(marked))
    mmae("report", runs[0], "--out", out, "--evaluate", "--device", "cpu")
    assert table((out / "report.html").read_text())[0][1] == "43.21%"
    # But not what was measured before the run went on.
    (runs[0] / "result.json").write_text(json.dumps(marked | {"step": 1}))
    mmae("report", runs[0], "--out", out, "--evaluate", "--device", "cpu")
    assert json.loads((runs[0] / "result.json").read_text()) == saved
    mmae("report", runs[0], "--out", out)  # an old picture is not shown as if it were of these
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 3


def test_two_branches_beside_a_masked_autoencoder(runs, tmp_path):
    run = pretrain(tmp_path / "simclr", "--method", "simclr")
    mmae("report", runs[0], run, "--out", tmp_path / "page", "--evaluate", "--device", "cpu")
    page = (tmp_path / "page" / "report.html").read_text()
    assert [row[0] for row in table(page)] == ["MAE", "SimCLR"]
    mmae("report", run, "--out", tmp_path / "alone", "--evaluate", "--device", "cpu")
    page = (tmp_path / "alone" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # it reconstructs nothing


def test_folders_that_cannot_be_compared(runs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no run in"):
        mmae("report", tmp_path)
    mmae("finetune", runs[1], "--out", tmp_path / "ft", "--epochs", 1, "--warmup-epochs", 0)
    with pytest.raises(SystemExit, match="is a fine-tuning; name the run that it started from"):
        mmae("report", tmp_path / "ft")
    mmae("report", runs[1], "--out", tmp_path / "page")
    assert "fine-tuning" in (tmp_path / "page" / "report.html").read_text()
