"""Command line: ``mmae COMMAND``, see ``COMMANDS`` below.

A command imports what it needs when it runs: help, and errors in what was asked for, need no torch
and come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from typing import Any

from mmae_fast.evaluation.config import (
    FINETUNE_RECIPES,
    AnalyzeConfig,
    EvalConfig,
    ExportConfig,
    FinetuneConfig,
    ProbeConfig,
    ReportConfig,
    VisualizeConfig,
    check_finetuning,
)
from mmae_fast.training.config import (
    METHODS,
    DemoConfig,
    PackConfig,
    PackedConfig,
    PretrainConfig,
    UserError,
    check,
    from_dict,
)
from mmae_fast.training.recipes import RECIPES

DEFAULT_RECIPE = "tiny"
INTERRUPTED = 130  # what shells report after Ctrl-C
BEGAN = time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        print(f"mmae: no command {command!r}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    try:
        COMMANDS[command][0](rest)
    except UserError as error:
        sys.exit(f"mmae {command}: error: {error}")
    except KeyboardInterrupt as interrupt:
        if main_process():
            print(f"\nmmae {command}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def main_process() -> bool:
    """Whether this one speaks for those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def usage() -> str:
    lines = "\n".join(f"  {name:<10} {effect}" for name, (_, effect) in COMMANDS.items())
    return f"usage: mmae COMMAND [OPTIONS]\n\n{lines}\n\nmmae COMMAND --help lists its options."


def parse(config: type, command: str, arguments: list[str], **kwargs: Any) -> Any:
    import tyro

    markers = (tyro.conf.PositionalRequiredArgs,)
    return tyro.cli(config, prog=f"mmae {command}", args=arguments, config=markers, **kwargs)


def _split_recipe(
    command: str, arguments: list[str], recipes: dict[str, Any]
) -> tuple[str, list[str]]:
    """The recipe that ``--recipe`` names, and the other arguments."""
    first = argparse.ArgumentParser(f"mmae {command}", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=recipes, default=DEFAULT_RECIPE)
    named, arguments = first.parse_known_args(arguments)
    return named.recipe, arguments


def _describe_recipes(effect: str, recipe: str, recipes: dict[str, Any]) -> str:
    listed = "\n".join(f"  {name}: {text}" for name, (text, _) in recipes.items())
    return f"{effect} --recipe NAME sets the defaults below (now: {recipe}).\n\n{listed}"


def pretrain(arguments: list[str]) -> None:
    # The option that everyone needs has a short name.
    arguments = [re.sub(r"^--method(?==|$)", "--loss.method", given) for given in arguments]
    recipe, arguments = _split_recipe("pretrain", arguments, RECIPES)
    effect = f"Train an encoder: --method {' | '.join(METHODS)}."
    description = _describe_recipes(effect, recipe, RECIPES)
    config = parse(
        PretrainConfig, "pretrain", arguments, default=RECIPES[recipe][1], description=description
    )
    if config.resume:
        from mmae_fast.training.runs import read_config

        # Parsed again over what was saved: an option given now that differs is refused later on.
        saved = dataclasses.replace(read_config(config.out), out=config.out, device=config.device)
        config = parse(PretrainConfig, "pretrain", arguments, default=saved)

    check(config)
    from mmae_fast.training.train import pretrain as run

    checkpoint = run(config, began=BEGAN)
    if main_process():
        print(f"Checkpoint: {checkpoint}")


def probe(arguments: list[str]) -> None:
    config = parse(ProbeConfig, "probe", arguments)

    from mmae_fast.evaluation.evaluate import probe as run

    _print_score(f"linear_probe_{config.protocol}", config, *run(config))


def knn(arguments: list[str]) -> None:
    config = parse(EvalConfig, "knn", arguments, description="kNN accuracy of a frozen encoder.")

    from mmae_fast.evaluation.evaluate import nearest_neighbours as run

    _print_score("knn", config, *run(config))


def _print_score(name: str, config: EvalConfig, accuracy: float, protocol: str) -> None:
    features = "class token" if config.pool == "cls" else "mean of the patch tokens"
    print(f"{accuracy:.2%}  ({protocol}; features: {features} of unmasked images)")
    # Kept with the run only where it says something of the run: on its own images, all of them.
    own = config.train is config.test is config.img_size is config.max_train is None
    if own and (config.checkpoint / "config.json").exists():
        path = config.checkpoint / f"{name}_{config.pool}.json"
        content = {"accuracy": accuracy, "protocol": protocol, "features": features}
        path.write_text(json.dumps(content, indent=2) + "\n")


def finetune(arguments: list[str]) -> None:
    import tyro

    recipe, arguments = _split_recipe("finetune", arguments, FINETUNE_RECIPES)
    default = dataclasses.replace(FINETUNE_RECIPES[recipe][1], checkpoint=tyro.MISSING)
    description = _describe_recipes(
        "Train an encoder and a classifier on labelled images.", recipe, FINETUNE_RECIPES
    )
    config = parse(FinetuneConfig, "finetune", arguments, default=default, description=description)
    if config.resume:
        from mmae_fast.training.runs import read_run

        # Parsed again over what was saved: an option given now that differs is refused later on.
        saved = from_dict(FinetuneConfig, read_run(config.out)["config"])
        kept = {"checkpoint": tyro.MISSING, "out": config.out, "device": config.device}
        default = dataclasses.replace(saved, **kept)
        config = parse(FinetuneConfig, "finetune", arguments, default=default)

    check_finetuning(config)
    from mmae_fast.evaluation.finetune import finetune as run

    accuracy, protocol = run(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"{accuracy:.2%}  ({protocol})\nClassifier: {config.out}")


def export(arguments: list[str]) -> None:
    config = parse(ExportConfig, "export", arguments)

    from mmae_fast.evaluation.export import export as run

    print(run(config))


def report(arguments: list[str]) -> None:
    config = parse(ReportConfig, "report", arguments)

    from mmae_fast.evaluation.compare import compare_runs

    print(f"Report: {compare_runs(config)}")


def analyze(arguments: list[str]) -> None:
    config = parse(AnalyzeConfig, "analyze", arguments)

    from mmae_fast.evaluation.analyze import run_analysis

    run_analysis(config)


def visualize(arguments: list[str]) -> None:
    config = parse(VisualizeConfig, "visualize", arguments)

    from mmae_fast.evaluation.evaluate import visualize as run

    print(run(config))


def data(arguments: list[str]) -> None:
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        print("usage: mmae data pack SOURCE DIR [OPTIONS] | info DIR | verify DIR")
        return
    if action not in ("pack", "info", "verify"):
        raise UserError(f"pack, info or verify, not {action!r}")
    config = parse(PackConfig if action == "pack" else PackedConfig, f"data {action}", rest)

    from mmae_fast.training.data import packed

    if action == "pack":
        try:
            out = packed.write_pack(config)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
        print(f"{packed.describe_pack(out)}\nPack: {out}")
    elif action == "info":
        print(packed.describe_pack(config.pack))
    else:
        packed.verify_pack(config.pack)
        print(f"{config.pack}: all checksums fit")


def demo(arguments: list[str]) -> None:
    config = parse(DemoConfig, "demo", arguments)

    from mmae_fast.demo import run_demo

    run_demo(config)


def doctor(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"doctor takes no options, got {' '.join(arguments)}")

    from mmae_fast.doctor import main as run

    run()


COMMANDS = {
    "pretrain": (pretrain, "train an encoder: MAE, U-MAE, M-MAE, Barlow Twins, spectral, SimCLR"),
    "probe": (probe, "linear probe of a pretrained encoder"),
    "knn": (knn, "nearest-neighbour accuracy of a pretrained encoder"),
    "finetune": (finetune, "train encoder and classifier on labelled images"),
    "export": (export, "write the weights for timm or Hugging Face"),
    "report": (report, "compare runs on one page"),
    "analyze": (analyze, "entropies of a model layer by layer, or of trainings over time"),
    "visualize": (visualize, "draw masked and reconstructed images"),
    "data": (data, "pack images once into a memory-mapped file; describe or verify a pack"),
    "demo": (demo, "compare MAE, U-MAE and M-MAE in minutes on a CPU, with a report"),
    "doctor": (doctor, "say which backends run here, and why the others do not"),
}

if __name__ == "__main__":
    main()
