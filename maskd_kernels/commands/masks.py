"""``maskd-kernels masks``: a PNG of what receptive tokens look at."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import as_levels, kind
from maskd_kernels.distill.plot import plot_masks
from maskd_kernels.distill.recording import Recorder
from maskd_kernels.distill.taps import Layer
from maskd_kernels.functional import receptive_masks
from maskd_kernels.losses.checkpoints import read_tokens

FEATURE_FILES = (".pt", ".pth", ".npy")


def read_features(path: Path) -> list[Tensor]:
    """The levels in a saved file, ``[N, C, *spatial]`` or without the first axis; nothing in it is executed.

    Raises:
        ValueError: a file that holds no features, or that only loads by executing code.
        OSError: a file that cannot be read.
    """
    try:
        if path.suffix == ".npy":
            import numpy

            content: Any = torch.as_tensor(numpy.load(path, allow_pickle=False))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as saved features: {str(error).splitlines()[0]}") from None
    if (isinstance(content, Tensor) and content.dim() == 2) or not isinstance(content, (Tensor, Mapping, list, tuple)):
        raise ValueError(f"{path}: expected features [N, C, H, W], or a list or dict of them, got {kind(content)}")
    try:
        return [x.detach() for x in as_levels(content, str(path)).values()]
    except TypeError as error:
        raise ValueError(str(error)) from None


def read_image(path: Path) -> Tensor:
    """``[3, H, W]`` uint8.

    Raises:
        ValueError: a file that is no image.
        OSError: a file that cannot be read.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "maskd-kernels[plot]"') from error
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            data, (width, height) = bytearray(image.convert("RGB").tobytes()), image.size
    except Exception as error:  # decoders raise whatever they like
        endings = ", ".join(FEATURE_FILES)
        raise ValueError(f"{path}: expected an image, or features in a file that ends in {endings} ({error})") from None
    return torch.frombuffer(data, dtype=torch.uint8).reshape(height, width, 3).movedim(-1, 0)


def load_model(spec: str) -> nn.Module:
    """The model that ``package.module:function`` returns, from the working folder or what is installed.

    Raises:
        ValueError: no such module or function, or one that returns no model.
    """
    module_name, _, attribute = spec.partition(":")
    if not attribute:
        raise ValueError(f"--teacher: expected package.module:function, got {spec!r}")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--teacher: {spec}: {error}") from None
    finally:
        sys.path.remove("")
    try:
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise RuntimeError(f"--teacher: {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--teacher: {spec}: expected a function that returns a model, got {kind(model)}")
    return model.eval()


def teacher_features(model: nn.Module, layer: str, image: Tensor) -> list[Tensor]:
    """The levels that a layer puts out for one image, which goes in as ``[1, 3, H, W]`` from 0 to 1."""
    where = Layer(layer).resolved(model, "--layer")
    try:
        with torch.no_grad():
            _, recorded = Recorder(model, "teacher", where.names).run(model, (image[None] / 255,), {})
    except Exception as error:
        raise RuntimeError(f"--teacher: the model raised {type(error).__name__}: {error}") from error
    return where.features(recorded, None, "--layer").levels


def chosen_level(levels: list[Tensor], tokens: list[Tensor], level: int, one_level: bool) -> Tensor:
    """The features that go with the tokens of a level.

    Raises:
        ValueError: no such level, other numbers of levels, or other channels.
    """
    if not 0 <= level < len(tokens):
        raise ValueError(f"--level: the tokens have levels 0 to {len(tokens) - 1}, got {level}")
    if len(levels) != len(tokens) and not (one_level and len(levels) == 1):
        raise ValueError(f"the tokens have {len(tokens)} level(s), the features {len(levels)}")
    x = levels[level if len(levels) > 1 else 0]
    x = x[None] if x.dim() == 3 else x
    channels = tokens[level].shape[1]
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"level {level}: expected features [N, {channels}, H, W] for these tokens, got {kind(x)}")
    return x


def masks(
    tokens_file: Path,
    source: Path,
    out: Path,
    *,
    image: Path | None = None,
    teacher: str | None = None,
    layer: str | None = None,
    level: int | None = None,
    index: int = 0,
) -> str:
    """Writes the masks of one level's tokens as a PNG.

    Args:
        tokens_file: tokens, in any format that ``convert`` reads.
        source: saved features, or an image that goes through ``teacher``.
        out: where the PNG goes.
        image: what is drawn below the masks of saved features; None: the mean strength of their channels.
        teacher: ``package.module:function`` that returns the model, for an image.
        layer: whose output the tokens were learned on, for an image.
        level: of the tokens and of the features; None: the first.
        index: which of the images in the features.

    Returns:
        What was written.

    Raises:
        ValueError: files that do not hold what they should, or do not fit each other.
        OSError: a file that cannot be read or written.
        ImportError: matplotlib is not installed.
    """
    tokens = [found["mask_token"] for found in read_tokens(tokens_file)]
    if source.suffix in FEATURE_FILES:
        if teacher or layer:
            raise ValueError(f"--teacher, --layer: {source} holds features already; they go with an image")
        levels = read_features(source)
        shown = None if image is None else read_image(image)
    else:
        shown = read_image(source)
        if not teacher or layer is None:
            raise ValueError(f"{source} is an image: --teacher and --layer say whose features the tokens see in it")
        levels = teacher_features(load_model(teacher), layer, shown)
    x = chosen_level(levels, tokens, level or 0, one_level=level is not None)
    if not 0 <= index < len(x):
        raise ValueError(f"--index: the features hold {len(x)} image(s), got {index}")
    own, features = tokens[level or 0].float(), x[index : index + 1].float()
    found = receptive_masks(features, own)[0]
    plot_masks(features[0].abs().mean(0, keepdim=True) if shown is None else shown, found, out)
    k, height, width = found.shape
    return f"{out}: {k} masks of {height}x{width} pixels, level {level or 0} of {len(tokens)}"
