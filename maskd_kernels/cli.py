"""The command line: ``maskd-kernels COMMAND``. What each command does is in ``commands``; errors are lines on stderr.

Exit codes: 0; 1 where something is off or cannot be done, the reason on stderr; 2 for a command line that is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from maskd_kernels import __version__, backends
from maskd_kernels.commands import bench, convert, info, masks, verify
from maskd_kernels.losses.checkpoints import FORMATS

Options = argparse.Namespace
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells have it: 128 and the signal


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return value


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not (separator and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, as in 100x136, got {text!r}")
    return int(height), int(width)


# ---- Commands ----------------------------------------------------------------------------------


def _info(options: Options) -> int:
    found = info.collect()
    print(json.dumps(found, indent=2) if options.json else info.text(found))
    return 0


def _verify(options: Options) -> int:
    return 0 if verify.verify(options.backend or (), show=lambda line: print(line, flush=True)) else 1


def _bench(options: Options) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device: there is no CUDA device that torch can use")
    if options.threads:
        torch.set_num_threads(options.threads)
    height, width = options.size
    settings = bench.Settings(
        device, options.dtype, options.batch, options.channels, height, width, options.tokens, options.seconds
    )
    if options.json:
        options.json.touch()  # before time is spent
    measured = bench.measure(settings)
    print(bench.text(settings, measured))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
    return 0


def _masks(options: Options) -> int:
    print(
        masks.masks(
            options.tokens,
            options.input,
            options.out,
            image=options.image,
            teacher=options.teacher,
            layer=options.layer,
            level=options.level,
            index=options.index,
        )
    )
    return 0


def _convert(options: Options) -> int:
    print(
        convert.convert(
            options.tokens, options.out, options.to, level=options.level, drop_weighting=options.drop_weighting
        )
    )
    return 0


def _demo(options: Options) -> int:
    needed = ("torchvision", "sklearn", "matplotlib", "tqdm")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'the demo needs {", ".join(missing)}: pip install "maskd-kernels[demo]"')
    from maskd_kernels import demo as stages

    stages.run(options.out, stages.QUICK if options.quick else None)
    return 0


# ---- The command line --------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Every command with its options, and examples in its help."""
    main_parser = argparse.ArgumentParser(
        prog="maskd-kernels",
        description="Fused kernels for masked feature distillation.",
        epilog="maskd-kernels COMMAND --help says more, with examples.",
    )
    main_parser.add_argument("--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[Options], int], summary: str, examples: str, more: str = ""
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {more}", 100),
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, command=name)
        return added

    add = command(
        "info",
        _info,
        "what is installed, which backends run here, and why one does not",
        "  maskd-kernels info          what to paste into a bug report\n  maskd-kernels info --json",
    ).add_argument
    add("--json", action="store_true", help="for programs")

    add = command(
        "verify",
        _verify,
        "compare every backend with plain PyTorch in float64, on this machine",
        "  maskd-kernels verify\n"
        "  maskd-kernels verify --backend native     fails also where the C++ kernels are missing\n"
        "  TRITON_INTERPRET=1 maskd-kernels verify --backend triton     without a GPU; takes minutes",
        "The exit code is 1 if anything is off.",
    ).add_argument
    add("--backend", action="append", choices=backends.BACKENDS[1:], help="only this one, which must run; repeatable")

    add = command(
        "bench",
        _bench,
        "time the MasKD loss on this machine, as published and by each backend",
        "  maskd-kernels bench\n"
        "  maskd-kernels bench --device cuda --dtype bfloat16 --batch 16\n"
        "  maskd-kernels bench --channels 19 --size 64x128 --seconds 5 --json bench.json",
    ).add_argument
    defaults = bench.Settings()
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=list(bench.DTYPES), default=defaults.dtype, help="of the maps (default: %(default)s)")
    add("--batch", type=_positive, default=defaults.batch, help="images (default: %(default)s)")
    add("--channels", type=_positive, default=defaults.channels, help="of the maps (default: %(default)s)")
    size = (defaults.height, defaults.width)
    add("--size", type=_size, default=size, metavar="HxW", help=f"pixels of the maps (default: {size[0]}x{size[1]})")
    add("--tokens", type=_positive, default=defaults.tokens, help="receptive tokens (default: %(default)s)")
    add("--threads", type=_positive, help="CPU threads (default: torch's)")
    add("--seconds", type=float, default=defaults.seconds, help="time to spend, about (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the figures and the machine here")

    add = command(
        "masks",
        _masks,
        "draw what receptive tokens look at, as a PNG",
        "  maskd-kernels masks tokens.pth features.pt masks.png --image photo.jpg\n"
        "  maskd-kernels masks tokens.pth features.npy masks.png --level 2 --index 5\n"
        "  maskd-kernels masks tokens.pth photo.jpg masks.png --teacher project.models:teacher --layer backbone.fpn",
        "The tokens' masks over features that were saved (a tensor [N, C, H, W] or [C, H, W], or a list or dict of "
        "levels; .pt by torch.save, .npy by numpy.save), or over those of a teacher for an image.",
    ).add_argument
    add("tokens", type=Path, help="tokens: TokenTrainer.save, the authors' checkpoints, or a loss's state_dict")
    add("input", type=Path, help="saved features (.pt, .pth, .npy), or an image")
    add("out", type=Path, help="the PNG")
    add("--image", type=Path, help="with features: the image below the masks")
    add(
        "--teacher",
        metavar="MODULE:FUNCTION",
        help="with an image: what returns the trained model; it is called with "
        "[1, 3, H, W] from 0 to 1, and normalises as it needs",
    )
    add("--layer", help="with an image: whose output the tokens were learned on, as named_modules spells it")
    add("--level", type=int, help="of the pyramid (default: the first); features may then be that level alone")
    add("--index", type=int, default=0, help="which image of the features (default: %(default)s)")

    add = command(
        "convert",
        _convert,
        "bring receptive tokens from one checkpoint format into another",
        "  maskd-kernels convert tokens.pth                           only says what is in it\n"
        "  maskd-kernels convert run.pth --to detection --out tokens.pth\n"
        "  maskd-kernels convert tokens.pth --level 0 --drop-weighting --to segmentation --out cityscapes.pth\n"
        "  maskd-kernels convert p3.pth p4.pth p5.pth --to loss --out pyramid.pth     one file a level\n",
        "Any format is read, also inside a larger checkpoint. detection: the authors' mmrazor code, and TokenTrainer; "
        "segmentation: the authors' segmentation code; loss and segmentation-loss: state_dict() of MasKDLoss and "
        "MasKDSegLoss.",
    ).add_argument
    add("tokens", type=Path, nargs="+", help="checkpoints; several are levels that follow each other")
    add("--to", choices=FORMATS, default="detection", help="(default: %(default)s)")
    add("--out", type=Path, help="the file to write; without it nothing is written")
    add("--level", type=int, help="only this level")
    add("--drop-weighting", action="store_true", help="leave out the weighting of the masks")

    add = command(
        "demo",
        _demo,
        "distil a segmenter through receptive tokens, start to end",
        "  maskd-kernels demo             about 10 minutes on two CPU cores\n"
        "  maskd-kernels demo --quick --out /tmp/demo",
    ).add_argument
    add("--out", type=Path, default=Path("demo_output"), help="folder for results (default: %(default)s)")
    add("--quick", action="store_true", help="a minute's run that only proves that everything works")
    return main_parser


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left goes at exit
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        print(f"maskd-kernels {options.command}: {_reason(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
