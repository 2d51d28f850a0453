"""Command line: ``mmae pretrain | probe | knn | analyze | visualize | data | demo | doctor``.

A command imports what it needs when it runs, so that ``mmae --help`` answers at once.
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

from mmae_fast.config import (
    METHODS,
    AnalyzeConfig,
    DemoConfig,
    EvalConfig,
    PackConfig,
    PackedConfig,
    PretrainConfig,
    UserError,
    VisualizeConfig,
)
from mmae_fast.recipes import RECIPES

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


def pretrain(arguments: list[str]) -> None:
    # The option that everyone needs has a short name.
    arguments = [re.sub(r"^--method(?==|$)", "--loss.method", given) for given in arguments]
    first = argparse.ArgumentParser("mmae pretrain", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES, default=DEFAULT_RECIPE)
    named, arguments = first.parse_known_args(arguments)
    recipe = named.recipe
    listed = "\n".join(f"  {name}: {effect}" for name, (effect, _) in RECIPES.items())
    description = (
        f"Train an encoder: --method {' | '.join(METHODS)}. --recipe NAME sets the defaults below "
        f"(now: {recipe}).\n\n{listed}"
    )
    config = parse(
        PretrainConfig, "pretrain", arguments, default=RECIPES[recipe][1], description=description
    )
    if config.resume:
        from mmae_fast.runs import read_config

        # Parsed again over what was saved: an option given now that differs is refused later on.
        saved = dataclasses.replace(read_config(config.out), out=config.out, device=config.device)
        config = parse(PretrainConfig, "pretrain", arguments, default=saved)

    from mmae_fast.train import pretrain as run

    checkpoint = run(config, began=BEGAN)
    if main_process():
        print(f"Checkpoint: {checkpoint}")


def probe(arguments: list[str]) -> None:
    config = parse(EvalConfig, "probe", arguments, description="Linear probe of a frozen encoder.")

    from mmae_fast.evaluate import linear_probe, run_features

    _print_score("linear_probe", config, *linear_probe(run_features(config)))


def knn(arguments: list[str]) -> None:
    config = parse(EvalConfig, "knn", arguments, description="kNN accuracy of a frozen encoder.")

    from mmae_fast.evaluate import knn as run
    from mmae_fast.evaluate import run_features

    _print_score("knn", config, *run(run_features(config)))


def _print_score(name: str, config: EvalConfig, accuracy: float, protocol: str) -> None:
    features = "class token" if config.pool == "cls" else "mean of the patch tokens"
    print(f"{accuracy:.2%}  ({protocol}; features: {features} of unmasked images)")
    if config.checkpoint.is_dir():
        path = config.checkpoint / f"{name}_{config.pool}.json"
        content = {"accuracy": accuracy, "protocol": protocol, "features": features}
        path.write_text(json.dumps(content, indent=2) + "\n")


def analyze(arguments: list[str]) -> None:
    config = parse(AnalyzeConfig, "analyze", arguments)

    from mmae_fast.analyze import run_analysis

    run_analysis(config)


def visualize(arguments: list[str]) -> None:
    config = parse(VisualizeConfig, "visualize", arguments)

    from mmae_fast.evaluate import visualize as run

    print(run(config))


def data(arguments: list[str]) -> None:
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        print("usage: mmae data pack SOURCE DIR [OPTIONS] | info DIR | verify DIR")
        return
    if action not in ("pack", "info", "verify"):
        raise UserError(f"pack, info or verify, not {action!r}")
    config = parse(PackConfig if action == "pack" else PackedConfig, f"data {action}", rest)

    from mmae_fast.data import packed

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
    "analyze": (analyze, "entropies of a model layer by layer, or of trainings over time"),
    "visualize": (visualize, "draw masked and reconstructed images"),
    "data": (data, "pack images once into a memory-mapped file; describe or verify a pack"),
    "demo": (demo, "compare MAE, U-MAE and M-MAE in minutes on a CPU, with a report"),
    "doctor": (doctor, "say which backends run here, and why the others do not"),
}

if __name__ == "__main__":
    main()
