"""The extension checks what it is handed: a mistake in Python raises, and nothing is read or written."""

import pytest
import torch

from maskd_kernels import maskd_loss, native, use_backend, validation
from maskd_kernels.ops import layout, squared_error

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels were not built")


def scale(**changed):
    """A call of the extension that is right but for what is changed."""
    x, y, factor = torch.randn(2, 3, 4, 5), torch.full((2, 3, 4, 5), -7.0), torch.ones(2, 4, 5)
    feature = layout.dense_view(x)
    arguments = {
        "shape": layout.map_shape(feature),
        "x": layout.describe(feature),
        "y": layout.describe(layout.dense_view(y)),
        "scale": native.address(factor),
        "float64": False,
    }
    arguments.update({k: v(arguments) for k, v in changed.items()})
    try:
        native.module().scale_pixels_forward(**arguments)
    finally:
        if changed:
            assert (y == -7).all()
    assert torch.equal(y, x)


def test_what_is_right_passes():
    scale()


def entry(name, position, value):
    return {name: lambda a: (*a[name][:position], value, *a[name][position + 1 :])}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (entry("x", 0, 0), "x: expected an address"),
        (entry("x", 1, 7), "x: unknown dtype code 7"),
        (entry("x", 1, 1), "x: expected no float64"),
        ({"float64": lambda a: True}, "x: expected float64"),
        (entry("x", 2, (2, 4, 20)), r"x: expected \[2, 3, 20\], got \[2, 4, 20\]"),
        (entry("x", 3, (60, 20, 2)), "x: expected dense pixels"),
        (entry("x", 3, (60, 21, 1)), "x: reaches past its memory"),
        (entry("x", 3, (-60, 20, 1)), "x: expected no negative stride"),
        (entry("y", 3, (0, 20, 1)), "y: expected a place for each element"),
        (entry("y", 3, (60, 0, 1)), "y: expected a place for each element"),
        (entry("y", 4, 119), "y: reaches past its memory"),
        (entry("scale", 0, 0), "scale: expected 40 elements"),
        (entry("scale", 1, 2), "scale: expected 40 elements of dtype code 0, got 40 of 2"),
        (entry("scale", 2, 39), "scale: expected 40 elements of dtype code 0, got 39"),
    ],
)
def test_a_mistake_raises(changed, message):
    with pytest.raises(ValueError, match=message):
        scale(**changed)


def test_expanded_factors_are_refused():
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        native.address(torch.ones(1).expand(5))


@pytest.mark.parametrize(
    ("shape", "strides", "dtype"),
    [([-1], [], 0), ([2], [1, 1], 0), ([2, 3], [4, 1], 0), ([1 << 62], [], 0), ([2], [], 4)],
)
def test_impossible_tensors_raise(shape, strides, dtype):
    with pytest.raises(ValueError):
        native.module().new_tensor(shape, strides, dtype)


@pytest.mark.parametrize("tokens", [validation.MAX_TOKENS + 1, 70_000])
def test_too_many_tokens_raise(tokens):
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="expected at most 1024 tokens"):
        maskd_loss(x, x, torch.randn(tokens, 2))


def test_empty_levels_write_their_gradients():
    """Poisoned memory shows what a kernel whose loop never runs leaves unwritten."""
    with use_backend("native"):
        x, factor = torch.randn(2, 3, 0, 4), torch.randn(2, 3, requires_grad=True)
        error = squared_error.squared_error([x], [x], [factor])
        (gradient,) = torch.autograd.grad(error.sum(), factor)
    assert torch.equal(gradient, torch.zeros(2, 3))
