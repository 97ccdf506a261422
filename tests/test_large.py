"""Kernels at the far end of tensors with more than 2^31 elements: programs of Triton's, run alone by its interpreter.

The memory is there, but only the pages that are touched take any. Where an index is computed in 32 bits that do not
hold it, the interpreter says so.
"""

import dataclasses
import mmap
import os

import pytest
import torch
from helpers import DEVICE

pytest.importorskip("triton")
if DEVICE != "cpu" or os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("by the interpreter alone", allow_module_level=True)

from triton.runtime import interpreter

from maskd_kernels.reference import ReceptiveStats
from maskd_kernels.triton import (
    attention_stats,
    blocks,
    common,
    maskd_loss,
    receptive_stats,
    scale_pixels,
    squared_error,
)
from maskd_kernels.triton.common import Levels, encode
from maskd_kernels.triton.launch import forget
from maskd_kernels.triton.maskd_loss import Weighting
from maskd_kernels.triton.receptive_stats import Case, Places, Reduced

LIMIT = 2**31
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE


@pytest.fixture
def alone(monkeypatch):
    """Runs one program of a grid: ``alone(kernel, grid, index, *arguments, **constants)``."""
    builder = interpreter.interpreter_builder

    def run(kernel, grid, index, *arguments, **constants):
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", grid))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", index))
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))  # checks overflows
        # It works on the tensors themselves, and would copy them onto themselves in the end.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        kernel[(1, 1, 1)](*arguments, **constants)

    return run


def sparse(*shape, dtype=torch.float32):
    """Zeros."""
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, dtype.itemsize * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)


def one_level(channels):
    """Of one tile."""
    return Levels((0,), (1,), (channels,), (1,), (0,)).encoded()


def reduce_stats(alone, images, tokens, channels, column):
    """Of the last image, with 1 in this column of its partial sums."""
    sums_at = -(-(2 * tokens + tokens**2) // 64) * 64
    row_size = sums_at + channels
    partials = sparse(images, row_size)
    partials[-1, column] = 1
    out = Reduced(
        sparse(1, images, tokens),
        sparse(1, images, tokens),
        sparse(1, images, tokens, tokens),
        sparse(images, 9, channels),
    )
    case = Case(tokens, tokens, False, sums_at)
    places = Places(encode([0]), encode([0]), encode([0]), *encode([1, channels, row_size]))
    grid = -(-row_size // 64), images, 1
    borders, index = sparse(images, 8, channels) if channels else None, (column // 64, images - 1, 0)
    alone(
        receptive_stats.reduce_stats_kernel,
        grid,
        index,
        partials,
        borders,
        out,
        one_level(channels),
        places,
        CASE=case,
        ROWS=32,
        BLOCK=64,
    )
    return out


def test_gram_matrices(alone):
    images, tokens = LIMIT // 1024**2 + 1, 1024
    out = reduce_stats(alone, images, tokens, 0, 2 * tokens + tokens**2 - 1)
    assert out.gram[0, -1, -1, -2:].tolist() == [0, 1]


def test_sums_of_channels(alone):
    images, channels = 65535, LIMIT // (65535 * 9) + 65
    sums_at = 0
    out = reduce_stats(alone, images, 0, channels, sums_at + channels - 1)
    assert out.sums[-1, :, -2:].T.tolist() == [[0] * 9, [1] * 9]


def test_channels_of_many_images(alone):
    images, channels = 65535, LIMIT // 65535 + 65
    partials, out = sparse(images, channels), sparse(images, channels)
    partials[-1, -1] = 1
    grid = -(-channels // 64), images, 1
    alone(
        common.reduce_kernel,
        grid,
        (grid[0] - 1, images - 1, 0),
        partials,
        (out,),
        one_level(channels),
        encode([channels]),
        1,
        channels,
        ROWS=32,
        BLOCK=64,
    )
    assert out[-1, -2:].tolist() == [0, 1]


def weighting(alone, channels, tokens, images, blocks, block):
    """The logits of one block of columns; the last element of each parameter is 1."""
    parameters = sparse(channels, 9 * channels), sparse(channels), sparse(tokens, channels), sparse(tokens)
    for x in parameters:
        x.view(-1)[-1] = 1
    sums, logits = sparse(images, 9, channels), sparse(1, blocks, images, tokens)
    sums[..., -1] = 1
    alone(
        maskd_loss.weighting_kernel,
        (blocks, 1, 1),
        (block, 0, 0),
        Weighting(*[(x,) for x in parameters]),
        sums,
        logits,
        encode([channels]),
        encode([1]),
        encode([0]),
        images,
        channels,
        blocks,
        C_ALIGN=1,
        K=tokens,
        K_PAD=max(tokens, 16),
        BLOCK_N=16,
        BLOCK_C=32,
        BLOCK_J=32,
    )
    return logits


def test_weights_of_many_channels(alone):
    channels = 15456
    blocks = 9 * channels // 32
    logits = weighting(alone, channels, 16, 1, blocks, blocks - 1)
    assert logits[0, -1, 0, -2:].tolist() == [0, 1]


def test_logits_of_many_images(alone):
    images, tokens = 65535, 64
    blocks = LIMIT // (images * tokens) + 1
    logits = weighting(alone, 8, tokens, images, blocks, blocks - 1)
    assert not logits[0, -1, -1].any()


def test_shares_of_many_levels(alone):
    images, tokens = 65535, 1024
    levels, blocks = 3, LIMIT // (3 * images * tokens) + 1
    mass, error, share = (sparse(levels, images, tokens) for _ in range(3))
    loss = sparse(levels, images)
    mass[-1, -1], error[-1, -1] = 1, 1
    alone(
        maskd_loss.share_kernel,
        (images, levels, 1),
        (images - 1, levels - 1, 0),
        mass,
        error,
        sparse(levels, blocks, images, tokens),
        share,
        loss,
        encode([1] * levels),
        blocks,
        0.0,
        K=tokens,
        K_PAD=tokens,
        WEIGHTED=True,
        LEAST_MASS=0.0,
        ROWS=32,
    )
    torch.testing.assert_close(loss[-1, -1].item(), 1 / images)


# ---- Whole launches ----------------------------------------------------------------------------

SHAPES = {"images": (65535, 515, 8, 8), "pixels": (2, 520, 1440, 1440), "ragged": (2, 515, 1451, 1451)}


@pytest.fixture
def far_ends(alone, monkeypatch):
    """Launches of each grid the last program, of the last image, and one further up, before those of borders.

    And the first one, of the first image, which takes the last tile of the last image where walks begin there.
    """
    launched = set()

    def launch(kernel, grid, *arguments, **named):
        launched.add(kernel.fn.__name__)
        x, *rest = (*grid, 1, 1)[:3]
        last = [size - 1 for size in rest]
        for index in {(0, 0, last[-1]), (max(x - 41, 0), *last), (x - 1, *last)}:
            alone(kernel, (x, *rest), index, *arguments, **named)

    # Programs that are not run leave no edges for others to read.
    monkeypatch.setattr(receptive_stats, "empty", lambda like, *shape, dtype=None: sparse(*shape))
    for module in (blocks, common, receptive_stats):
        monkeypatch.setattr(module, "launch", launch)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would touch all of it
    yield launched
    forget()


@pytest.fixture
def large(request):
    """Makes maps."""

    def make(shape):
        n, c, *spatial = shape
        if request.param == "planar":
            return sparse(*shape, dtype=torch.bfloat16)
        return sparse(n, *spatial, c, dtype=torch.bfloat16).movedim(-1, 1)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("large", "shape", "tokens"),
    [
        ("planar", "images", 9),
        ("interleaved", "images", 2),
        ("planar", "pixels", 2),
        ("interleaved", "pixels", 9),
        ("planar", "ragged", 2),
    ],
    indirect=["large"],
)
def test_statistics(far_ends, large, shape, tokens):
    shape = SHAPES[shape]
    (n, c), p = shape[:2], shape[2] * shape[3]
    maps, embeddings = [[large(shape)] for _ in range(4)], [sparse(tokens, c)]
    stats = ReceptiveStats(
        masks=sparse(n, tokens, p),
        teacher_masks=sparse(n, tokens, p),
        distance=sparse(n, p),
        mass=sparse(1, n, tokens),
        error=sparse(1, n, tokens),
        gram=sparse(1, n, tokens, tokens),
        sums=sparse(n, 9, c),
    )
    teacher, student, grad_teacher, grad_student = maps
    receptive_stats.forward(teacher, embeddings, student, torch.tensor(True), stats)
    receptive_stats.backward(
        teacher, embeddings, student, stats, stats, (grad_teacher, [sparse(tokens, c)], grad_student)
    )
    receptive_stats.backward(teacher, embeddings, student, stats, stats, ([], [], grad_student))
    assert far_ends == {
        *("forward_kernel", "reduce_stats_kernel", "edges_kernel", "slopes_kernel", "backward_kernel"),
        *("student_kernel", "reduce_kernel"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("large", "shape"),
    [("planar", "pixels"), ("interleaved", "images"), ("interleaved", "pixels"), ("planar", "ragged")],
    indirect=["large"],
)
def test_streams(far_ends, large, shape):
    shape = SHAPES[shape]
    (n, c), spatial = shape[:2], shape[2:]
    maps = [[large(shape)] for _ in range(4)]
    per_pixel, per_channel, per_image = [sparse(n, *spatial)], [sparse(n, c)], sparse(1, n)
    scale_pixels.forward(maps[0], per_pixel, maps[1])
    scale_pixels.backward(maps[0], per_pixel, maps[1], maps[2], [sparse(n, *spatial)])
    squared_error.forward(*maps[:2], per_channel, per_image)
    squared_error.backward(*maps[:2], per_channel, per_image, *maps[2:], [sparse(n, c)])
    attention_stats.forward(maps[0], per_pixel, per_channel)
    attention_stats.backward(maps[0], per_pixel, per_channel, maps[1])
    assert far_ends == {"forward_kernel", "backward_kernel", "reduce_kernel"}
