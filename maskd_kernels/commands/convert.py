"""``maskd-kernels convert``: receptive tokens between the authors' formats and those of this package's losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskd_kernels.losses.checkpoints import as_checkpoint, read_tokens


def describe(levels: Sequence[dict[str, Tensor]]) -> str:
    """One line per level."""
    lines = []
    for number, level in enumerate(levels):
        k, c = level["mask_token"].shape
        weighting = "with a weighting of masks" if len(level) > 1 else "no weighting of masks"
        lines.append(f"level {number}: {k} tokens of {c} channels, {str(level['mask_token'].dtype)[6:]}, {weighting}")
    return "\n".join(lines)


def convert(
    sources: Sequence[Path],
    out: Path | None = None,
    form: str = "detection",
    *,
    level: int | None = None,
    drop_weighting: bool = False,
) -> str:
    """Reads checkpoints of any format, whose levels follow each other, and writes one.

    Args:
        sources: the files.
        out: where the result goes; None: nothing is written, what is there is described.
        form: one of ``losses.checkpoints.FORMATS``.
        level: only this level.
        drop_weighting: leave out the weighting of the masks.

    Returns:
        What was read, and what was written.

    Raises:
        ValueError: no tokens in a file, no such level, or a format that has no place for what was read.
        OSError: a file that cannot be read or written.
    """
    levels = [found for source in sources for found in read_tokens(source)]
    if level is not None:
        if not 0 <= level < len(levels):
            raise ValueError(f"--level: expected a level from 0 to {len(levels) - 1}, got {level}")
        levels = [levels[level]]
    if drop_weighting:
        levels = [{"mask_token": found["mask_token"]} for found in levels]
    if out is None:
        return describe(levels)
    try:
        checkpoint = as_checkpoint(levels, form)
    except ValueError as error:
        hint = "--level N takes one level" if len(levels) > 1 else "--drop-weighting leaves the weighting out"
        raise ValueError(f"{error}; {hint}") from None
    write(checkpoint, out)
    return f"{describe(levels)}\nwritten to {out}, format {form}"


def write(checkpoint: object, out: Path) -> None:
    """By way of a file beside it, so that what is there stays whole where writing fails; a device is written to."""
    target = out.resolve()
    part = target if target.exists() and not target.is_file() else Path(f"{target}.part")
    try:
        with part.open("wb") as file:
            torch.save(checkpoint, file)
        if part != target:
            part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None
    finally:
        if part != target:
            part.unlink(missing_ok=True)
