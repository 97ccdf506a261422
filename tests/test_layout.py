"""Feature maps as strided ``[N, C, P]`` views."""

import math

import pytest
import torch
from helpers import features

from maskd_kernels.ops import layout

LAYOUTS = ["contiguous", "channels_last", "sliced", "rows", "every_other"]
LAYOUTS += ["expanded_batch", "expanded_pixels", "expanded_channels"]
SHAPES = [
    (2, 3, 4, 5),
    (2, 3, 1, 5),
    (2, 3, 4, 1),
    (1, 1, 4, 5),
    (2, 3, 1, 1),
    (2, 1, 1, 1),
    (2, 3, 7),
    (2, 3, 2, 1, 4),
]
SHAPES += [(0, 3, 4, 5), (2, 3, 0, 5)]


def values(feature):
    """What a kernel sees."""
    return torch.as_strided(feature.tensor, feature.shape, feature.stride, feature.tensor.storage_offset())


def check(feature, x):
    n, c, *spatial = x.shape
    assert feature.shape == (n, c, math.prod(spatial))
    if x.numel() == 0:
        return
    assert torch.equal(values(feature), x.flatten(2))
    dense = 1 if feature.interleaved else 2
    assert feature.stride[dense] == 1 or feature.shape[dense] <= 1
    assert feature.rest_stride == feature.stride[3 - dense]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_keeps_its_values(shape, name):
    x = features(shape, layout=name, grad=False)
    feature = layout.dense_view(x)
    check(feature, x)
    for interleaved in (False, True) if x.numel() else ():
        other = layout.with_layout(feature, interleaved)
        assert other.interleaved == interleaved
        check(other, x)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "expanded_batch"])
def test_what_strides_can_express_is_not_copied(name):
    x = features((2, 3, 4, 5), layout=name, grad=False)
    assert layout.dense_view(x).tensor is x
    rows = torch.randn(2, 5, 6, 4)[:, 1:4, 2:5]  # channels and rows left out
    assert layout.dense_view(rows).tensor is rows


def test_a_permuted_map_is_copied():
    x = torch.randn(2, 3, 4, 5).permute(0, 1, 3, 2)
    check(layout.dense_view(x), x)


def test_nothing_with_strides_that_do_not_merge():
    x = torch.randn(2, 3, 4, 6)[:0, :, ::2, ::2]
    assert layout.dense_view(x).shape == (0, 3, 6)
