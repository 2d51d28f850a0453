"""The command line: help, errors without tracebacks, and the whole chain on digits."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmae_fast import cli, demo
from mmae_fast.training.config import DemoConfig, ModelConfig

pytest.importorskip("sklearn")
SMALL = ["--model.patch-size", "2", "--model.embed-dim", "16", "--model.depth", "1"]
SMALL += ["--model.num-heads", "2", "--model.decoder-embed-dim", "8"]
SMALL += ["--model.decoder-num-heads", "2", "--device", "cpu"]


def mmae(*arguments):
    cli.main([str(argument) for argument in arguments])


def failure(capsys, *arguments):
    """What a failing command says, and its exit status."""
    with pytest.raises(SystemExit) as caught:
        mmae(*arguments)
    if isinstance(caught.value.code, str):  # printed by the interpreter, with status 1
        return caught.value.code, 1
    output = capsys.readouterr()
    return output.out + output.err, caught.value.code


def pretrain(out, *arguments):
    mmae("pretrain", "--data.train", "digits", "--out", out, "--epochs", "1", *SMALL, *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    pretrain(out, "--log-every", "2")
    return out


def test_help_lists_the_commands(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        mmae(*arguments)
        text = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert f"\n  {command} " in text


def test_module_runs_as_a_script():
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "mmae_fast.cli", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: mmae COMMAND")


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"data", "doctor", "export"}))
def test_help_of_a_command(capsys, command):
    text, status = failure(capsys, command, "--help")
    assert status == 0
    assert f"usage: mmae {command}" in text
    assert "--device" in text


WITHOUT_TORCH = """
import sys
from mmae_fast.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--help", "usage: mmae COMMAND"),
        ("pretrain --help", "--loss.mu"),
        ("finetune --help", "--layer-decay"),
        ("pretrain --colour red", "--colour"),
        ("pretrain --epochs -1", "error: epochs must be > 0, got -1"),
        ("pretrain --method simclr --shard", "error: shard is for masked autoencoders"),
        ("pretrain --resume --out nothing", "error: no run in nothing"),
        ("finetune run --rand-augment 31", "error: rand_augment must be in [0, 30], got 31"),
    ],
)
def test_help_and_errors_need_no_torch(arguments, said, tmp_path):
    """Which takes seconds to load."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said in done.stdout + done.stderr and "Assertion" not in done.stderr


def test_recipe_sets_the_defaults(capsys):
    assert (
        "(default: 1024)" in failure(capsys, "pretrain", "--recipe", "mmae-vit-l-in1k", "--help")[0]
    )
    assert "(default: 128)" in failure(capsys, "pretrain", "--recipe=tiny", "--help")[0]


def test_unknown_command_and_option(capsys):
    text, status = failure(capsys, "train")
    assert status == 2 and "no command 'train'" in text and "pretrain" in text
    text, status = failure(capsys, "pretrain", "--colour", "red")
    assert status == 2 and "--colour" in text


def test_pretrain_probe_knn_visualize(run, capsys, tmp_path):
    assert json.loads((run / "config.json").read_text())["config"]["model"]["embed_dim"] == 16
    mmae("probe", run)
    assert "Linear probe (L-BFGS): multinomial" in capsys.readouterr().out
    mmae("probe", run, "--protocol", "lars", "--augment", "--epochs", "4", "--warmup-epochs", "1")
    said = capsys.readouterr().out
    assert "(LARS)" in said and "lr 0.05 x 1,438/256" in said and "random crops" in said
    mmae("knn", run, "--pool", "mean")
    assert "mean of the patch tokens" in capsys.readouterr().out
    assert "accuracy" in json.loads((run / "linear_probe_lars_cls.json").read_text())
    for name in ("linear_probe_lbfgs_cls", "knn_mean"):
        saved = json.loads((run / f"{name}.json").read_text())
        assert 0.1 < saved["accuracy"] <= 1
    mmae("visualize", run, "--out", tmp_path / "r.png", "--count", "3")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_from_images_to_a_model_of_timm(tmp_path, capsys):
    """The whole way: pretrain, probe, kNN, fine-tune, export, and the same features in timm."""
    import torch

    from mmae_fast.training.checkpoint import load_model
    from mmae_fast.training.config import DataConfig
    from mmae_fast.training.data import load_data

    run, tuned = tmp_path / "run", tmp_path / "tuned"
    pretrain(run)
    mmae("probe", run)
    mmae("knn", run)
    command = ["finetune", run, "--out", tuned, "--epochs", "1", "--warmup-epochs", "0"]
    mmae(*command)
    assert "Fine-tuning: all weights, 1 epochs" in capsys.readouterr().out
    mmae(*command, "--resume")  # nothing is left to do
    again = json.loads((tuned / "finetune.json").read_text())["accuracy"]
    assert again == json.loads((run / "finetune.json").read_text())["accuracy"]
    text, status = failure(capsys, *command, "--resume", "--base-lr", "7")
    assert status == 1 and "cannot be resumed with other settings: base_lr" in text
    capsys.readouterr()

    images = load_data(DataConfig(train="digits"))[1].images[:50]
    model, meta = load_model(run, torch.device("cpu"))
    images = (images / 255 - meta["data"]["mean"][0]) / meta["data"]["std"][0]
    for source, out in ((run, tmp_path / "timm"), (tuned, tmp_path / "classifier")):
        mmae("export", source, out, "--format", "timm")
        names = {}
        exec(capsys.readouterr().out, names)
        with torch.no_grad():
            given = names["model"].eval()(images)
            if source == run:
                expected = model.forward_features(images)
                torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
            else:
                assert given.shape == (50, 10)
    mmae("export", run, "--format", "hf", tmp_path / "hf")
    assert "ViTMAEForPreTraining" in capsys.readouterr().out


def test_resume(run, capsys):
    pretrain(run, "--log-every", "2", "--resume")
    assert "Checkpoint:" in capsys.readouterr().out
    mmae("pretrain", "--resume", "--out", run)  # the saved settings need not be told again
    text, status = failure(capsys, "pretrain", "--resume", "--out", run, "--base-lr", "7")
    assert status == 1 and "cannot be resumed with other settings: base_lr" in text


def test_errors_are_one_line(run, capsys, tmp_path):
    for arguments, expected in (
        (["pretrain", "--data.train", "cifar", "--out", tmp_path / "a"], "no images at 'cifar'"),
        (["pretrain", "--data.train", "digits", "--out", tmp_path / "b"], "patch_size"),
        (["pretrain", "--data.train", "digits", "--out", run], "already holds a run"),
        (["pretrain", "--out", tmp_path / "c", "--resume"], "no run in"),
        (["probe", tmp_path / "nothing"], "no checkpoint at"),
        (["knn", run, "--train", tmp_path / "no.npz"], "no images at"),
        (["doctor", "--fast"], "doctor takes no options"),
    ):
        if "patch_size" in expected:
            arguments += ["--model.patch-size", "3"]
        text, status = failure(capsys, *arguments)
        assert status == 1
        assert text.startswith(f"mmae {arguments[0]}: error: ") and expected in text
        assert "\n" not in text


def test_ctrl_c_outside_training(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", (interrupt, ""))
    text, status = failure(capsys, "doctor")
    assert status == 130 and text == "\nmmae doctor: interrupted\n"


def test_demo(tmp_path, capsys, monkeypatch):
    model = ModelConfig(2, 16, 1, 2, 8, 1, 2)
    recipe = dataclasses.replace(demo.RECIPES["digits"], model=model)
    monkeypatch.setitem(demo.RECIPES, "digits", recipe)
    out = tmp_path / "demo"
    command = ["demo", "--data", "digits", "--epochs", "1", "--out", out, "--device", "cpu"]
    mmae(*command)
    text = capsys.readouterr().out
    for expected in ("scikit-learn's digits", "U-MAE", "raw pixels", "effective rank", "left"):
        assert expected in text
    for name in ("report.html", "entropy.png", "loss.png", "spectrum.png", "reconstructions.png"):
        assert (out / name).stat().st_size > 5000
    content = json.loads((out / "demo.json").read_text())
    assert [result["method"] for result in content["results"]] == ["mae", "u_mae", "m_mae"]
    for result in content["results"]:
        run = out / result["run"]
        assert (run / "metrics.jsonl").exists() and (run / "config.json").exists()
        assert len(list(run.glob("checkpoints/*/model.safetensors"))) == 1
        assert len(result["spectrum"]) == content["embed_dim"]
        assert 0.1 < result["linear_probe"] <= 1 and 1 <= result["effective_rank"] <= 16

    # A finished run is taken as it is; only what is missing is done.
    marked = json.loads((out / "mae-seed0" / "result.json").read_text()) | {"knn": 0.123}
    (out / "mae-seed0" / "result.json").write_text(json.dumps(marked))
    (out / "m_mae-seed0" / "result.json").unlink()
    mmae(*command, "--resume")
    assert "12.30%" in capsys.readouterr().out
    again = json.loads((out / "demo.json").read_text())["results"]
    assert again[2]["linear_probe"] == content["results"][2]["linear_probe"]

    demo.prepare(DemoConfig(out=out))  # without --resume: from the start
    assert not list(out.glob("*-seed0"))


def test_demo_spares_other_folders(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    text, status = failure(capsys, "demo", "--data", "digits", "--out", tmp_path)
    assert status == 1 and "is not empty and holds no demo" in text
