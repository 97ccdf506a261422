"""What test_ptx.py runs in processes of their own: ptx.py itself, and the operators, compiled for sm_80, by it.

Results are compared with float64 by the functions, and with the tolerances, that the other backends' tests use.
"""

import contextlib
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import ptx_arithmetic
import pytest
import test_maskd_loss
import test_streaming_ops
import torch
import triton
import triton.language as tl
from helpers import assert_close, check_stats, features
from ptx import PtxError, execute, execution, parse
from ptx_steps import make_step
from triton import knobs

from maskd_kernels import BackendUnavailableError, attention_stats, maskd_loss, use_backend
from maskd_kernels.triton.launch import forget

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


# The assembler has nothing to do here: its output is not what is executed.
def without_assembler(*arguments):
    if not arguments:  # by which the result is told from others in the cache
        return "without assembler", "without assembler"
    arguments[1].update(cubin=lambda source, metadata: b"")
    return None


if hasattr(knobs.runtime, "add_stages_inspection_hook"):  # from Triton 3.5 on
    knobs.runtime.add_stages_inspection_hook = without_assembler


# ---- The operators -----------------------------------------------------------------------------

# Few sets of levels: most of the time is compiling, anew for each number of levels and each divisibility.
MAPS = {
    "aligned": [(2, 24, 8, 16), (2, 40, 24, 36)],  # few tiles and many
    "ragged": [(2, 20, 5, 7), (2, 10, 13, 3), (2, 16, 0, 8), (2, 3, 1, 1)],  # rows that are no whole vectors, none
}
LAYOUTS = ["contiguous", "channels_last"]
# In these LLVM contracts a product into the first addition of a sum over the warp: its lanes then hold that sum with
# unlike last bits, and store it into one word. One of them stays; the result is as near, but which is not written down.
UNLIKE = {"maskd_loss.weighting_kernel", "scale_pixels.backward_kernel", "receptive_stats.forward_kernel"}
DTYPES = {"fp32": FLOAT32, "bf16": BFLOAT16}


def shifted(x):
    """The same map, one element into its memory."""
    memory = torch.zeros(1 + x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    view = memory[1:].as_strided(x.shape, x.stride())
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


def twice(run):
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not the same bits twice"


def check_loss(tokens, dtype, layout, maps=MAPS, place=lambda x: x, **options):
    for shapes in maps.values():
        student, teacher, *rest = test_maskd_loss.make(shapes, tokens, dtype=dtype, layout=layout)
        inputs = [place(x) for x in student], [place(x) for x in teacher], *rest
        with execution() as executor:
            test_maskd_loss.check(inputs, **options)
            assert {"forward_kernel", "student_kernel"} <= set(executor.launches)
            assert executor.unlike <= UNLIKE

            def both(inputs=inputs):
                value, gradients = test_maskd_loss.both(inputs, **options)
                return value, *gradients

            twice(both)


def check_statistics(tokens, dtype, layout, maps=MAPS, place=lambda x: x, **options):
    """With gradients of everything."""
    for shapes in maps.values():
        teacher, student = ([place(features(s, dtype, layout)) for s in shapes] for _ in range(2))
        embeddings = [torch.randn(tokens, s[1]).requires_grad_() for s in shapes]
        with execution() as executor:
            check_stats("triton", teacher, embeddings, student, **options)
            assert {"forward_kernel", "backward_kernel"} <= set(executor.launches)
            assert executor.unlike <= UNLIKE


def check_operator(name, dtype, layout, maps=MAPS, place=lambda x: x):
    function, _, make = test_streaming_ops.OPERATORS[name]
    for shapes in maps.values():
        levels = [make(shape, dtype, layout) for shape in shapes]
        inputs = [[place(x) for level in levels for x in level[i]] for i in range(len(levels[0]))]
        with execution() as executor:
            test_streaming_ops.check("triton", name, inputs)
            assert {"forward_kernel", "backward_kernel"} <= set(executor.launches)
            assert executor.unlike <= UNLIKE
            twice(lambda inputs=inputs, function=function: test_streaming_ops.flat(function(*inputs)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 6, 8])
def test_loss(tokens, dtype, layout):
    check_loss(tokens, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [6])
def test_statistics(tokens, dtype, layout):
    check_statistics(tokens, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["scale_pixels", "squared_error", "attention_stats"])
def test_streaming(name, dtype, layout):
    check_operator(name, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_signs_of_halves(layout):
    """Compared in pairs."""
    check_operator("attention_stats", FLOAT16, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flag", [False, True])
def test_statistics_customized(flag, layout):
    check_statistics(6, FLOAT32, layout, customize=torch.tensor(flag))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_without_student(layout):
    for shapes in MAPS.values():
        teacher = [features(s, FLOAT32, layout) for s in shapes]
        with execution():
            check_stats("triton", teacher, [torch.randn(6, s[1]).requires_grad_() for s in shapes], [])


@pytest.mark.parametrize("first", [False, True], ids=["hooks_last", "hooks_first"])
def test_saved_tensors_in_another_layout(first):
    """Hooks may give them back in other strides than the forward pass had, whose plan recalls the call."""
    student, teacher, *rest = test_maskd_loss.make([(2, 8, 4, 4)], 3, dtype=FLOAT32, layout="channels_last")
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x)

    def gradient(hooked):
        with hooks if hooked else contextlib.nullcontext():
            loss = maskd_loss(student, teacher, *rest[:1])
        return torch.autograd.grad(loss, student)[0]

    with use_backend("reference"):
        expected = gradient(False)
    with execution(), use_backend("triton"):
        forget()
        for hooked in (first, not first, not first):
            assert_close(gradient(hooked), expected, 1e-5, "gradient")


def test_a_batch_beyond_the_limits_of_a_grid():
    x = torch.randn(65536, 1, 1, 1)
    with execution(), pytest.raises(BackendUnavailableError, match="at most 65535 images, got 65536"):
        attention_stats(x)


ODD = {"one": [(2, 24, 8, 16), (2, 10, 5, 7)], "even": [(1, 64, 8, 16)]}  # whose channels fill whole steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", ["loss", "statistics", "scale_pixels", "squared_error", "attention_stats"])
def test_maps_at_an_odd_offset(check, layout):
    if check == "loss":
        check_loss(6, BFLOAT16, layout, ODD, shifted)
    elif check == "statistics":
        check_statistics(6, FLOAT32, layout, ODD, shifted)
    else:
        check_operator(check, BFLOAT16, layout, ODD, shifted)


# ---- The executor's own ------------------------------------------------------------------------


@triton.jit
def distance_kernel(x, y, out, total, size, start, BLOCK: tl.constexpr, HINT: tl.constexpr):
    """out = x - y, and the sum of its squares for each block."""
    i = tl.multiple_of(start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), HINT)
    d = tl.load(x + i, mask=i < size, other=0.0) - tl.load(y + i, mask=i < size, other=0.0)
    tl.store(out + i, d, mask=i < size)
    tl.store(total + tl.program_id(0), tl.sum(d * d))


@triton.jit
def block_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) < 1:
        tl.store(out + i, tl.load(x + i) * 2)
    else:
        tl.store(out + i + BLOCK, tl.load(x + i) * 3)


@triton.jit
def transpose_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    value = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(out + j[:, None] * M + i[None, :], tl.trans(value))


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for step in range(STEPS):
        left = tl.load(a + i[:, None] * (K * STEPS) + (step * K + k)[None, :])
        right = tl.load(b + (step * K + k)[:, None] * N + j[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + i[:, None] * N + j[None, :], total)


def distance(size=1000, start=0, hint=1, elements=1000, **options):
    x, y = torch.randn(elements), torch.randn(elements)
    with execution(**options):
        out, total = torch.empty(elements), torch.empty(triton.cdiv(size, 512))
        distance_kernel[(len(total),)](x, y, out, total, size, start, BLOCK=512, HINT=hint)
    return out, total, x - y


def replaced(old, new, count=1):
    """A rewriting of PTX that must find what it replaces."""

    def rewrite(source):
        assert old in source, source
        return source.replace(old, new, count)

    return rewrite


def test_kernel():
    out, total, expected = distance()
    assert torch.equal(out, expected)
    torch.testing.assert_close(total, torch.stack([expected[:512].square().sum(), expected[512:].square().sum()]))


def test_addresses_of_parameters():
    """Triton 3.9 chooses one of them, and reads it then."""
    parameters = ",\n".join(f".param .u64 kernel_param_{i}" for i in range(5))
    source = f"""
.visible .entry kernel({parameters}
) .reqntid 32
{{
    .reg .pred %p<2>; .reg .b32 %r<7>; .reg .b64 %rd<6>;
    mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r1, 1;
    mov.b32 %r2, kernel_param_0; mov.b32 %r3, kernel_param_1; selp.b32 %r4, %r3, %r2, %p1;
    ld.param.b64 %rd1, [%r4]; ld.param.b64 %rd2, [kernel_param_2];
    mov.u32 %r5, %tid.x; mad.lo.s32 %r6, %r1, 32, %r5;
    mul.wide.s32 %rd3, %r5, 4; add.s64 %rd4, %rd1, %rd3; ld.global.b32 %r5, [%rd4];
    mul.wide.s32 %rd3, %r6, 4; add.s64 %rd5, %rd2, %rd3; st.global.b32 [%rd5], %r5;
    ret;
}}"""
    x, y, out = torch.randn(32), torch.randn(32), torch.full((64,), torch.nan)
    execute(source, (2, 1, 1), 32, ["*fp32"] * 3, (x, y, out), 0)
    assert torch.equal(out, torch.cat([x, y]))
    for wrong in ("[%r4 + 64]", "[%r4 + 4]", "[%r4 + -8]"):
        with pytest.raises(PtxError, match=r"parameter address .* is outside"):
            execute(source.replace("[%r4]", wrong), (2, 1, 1), 32, ["*fp32"] * 3, (x, y, out), 0)


def test_blocks_go_different_ways():
    x = torch.randn(128)
    with execution():
        out = torch.empty(256)
        block_kernel[(2,)](x, out, BLOCK=128)
    assert torch.equal(out, torch.cat([2 * x, 3 * x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transposed(dtype):
    x = torch.randn(64, 32).to(dtype)
    with execution():
        out = torch.empty(32, 64, dtype=dtype)
        transpose_kernel[(1,)](x, out, M=64, N=32)
    assert torch.equal(out, x.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensor_cores(dtype):
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 32).to(dtype)
    with execution():
        out = torch.empty(64, 32)
        product_kernel[(1,)](a, b, out, M=64, N=32, K=32, STEPS=4, num_stages=3)
    exact = a.double() @ b.double()
    # tf32 has ten bits of mantissa.
    assert (out - exact).abs().max() <= exact.abs().max() * (2e-3 if dtype == torch.float32 else 1e-6)


def test_a_copy_is_not_there_before_it_is_waited_for():
    a, b = torch.randn(64, 128), torch.randn(128, 32)
    unwaited = execution(rewrite=lambda source: source.replace("cp.async.wait_group", "// "))
    with unwaited, pytest.raises(PtxError, match=r"shared address .* is read, but nobody wrote it"):
        product_kernel[(1,)](a, b, torch.empty(64, 32), M=64, N=32, K=32, STEPS=4, num_stages=3)


def test_wrong_alignment_hint():
    """Whether it is the kernel's promise that is wrong, or the address in the compiled code."""
    with pytest.raises(PtxError, match="is not aligned to 16 bytes"):
        distance(size=1024, start=2, hint=16, elements=1026)
    with pytest.raises(PtxError, match=r"global address .* is not aligned to 16 bytes.*; at: .*ld\.global\.v4\.b32"):
        distance(size=1024, hint=16, elements=1024, rewrite=vectors_moved)


def vectors_moved(source):
    lines = source.splitlines()
    at = next(i for i, line in enumerate(lines) if "ld.global.v4.b32" in line)
    lines[at] = lines[at].replace("+ 0 ]", "+ 4 ]")
    return "\n".join(lines)


def test_missing_barrier():
    with pytest.raises(PtxError, match=r"race on shared address .* no barrier between"):
        distance(rewrite=replaced("bar.sync", "// "))


def test_threads_that_hold_unlike_values():
    """Stored into one word: put down where they are of one warp, else a race."""

    def unguarded(source, value, address=r"\1"):
        store = re.compile(r"@%p\d+ st\.shared\.b32 (\[[^]]*\]), (%r\d+);")
        assert store.search(source)
        return store.sub(rf"mov.u32 %r999, {value}; st.shared.b32 {address}, %r999;", source, count=1)

    with execution(rewrite=lambda source: unguarded(source, r"\2")) as executor:
        x, out, total = torch.randn(1024), torch.empty(1024), torch.empty(2)
        distance_kernel[(2,)](x, 2 * x, out, total, 1024, 0, BLOCK=512, HINT=1)
        assert executor.unlike == set()
        torch.testing.assert_close(total, x.view(2, 512).square().sum(1))
    with execution(rewrite=lambda source: unguarded(source, "%tid.x")) as executor:
        distance_kernel[(2,)](x, 2 * x, out, total, 1024, 0, BLOCK=512, HINT=1)
        assert executor.unlike == {"ptx_cases.distance_kernel"}
    across = execution(rewrite=lambda source: unguarded(source, "%tid.x", "[global_smem]"))
    with across, pytest.raises(PtxError, match="race on shared address"):
        distance_kernel[(2,)](x, 2 * x, out, total, 1024, 0, BLOCK=512, HINT=1)


def test_an_index_one_past_the_end():
    with pytest.raises(PtxError, match="is outside every tensor"):
        distance(rewrite=lambda source: source.replace("setp.lt.s32", "setp.le.s32"))
    with pytest.raises(PtxError, match="is outside every tensor"):
        distance(size=1001)


def test_a_gap_in_a_view_is_outside():
    """A tensor's elements, not its memory."""
    memory = torch.randn(64, 48)
    x = memory[:, :32]
    with execution(), pytest.raises(PtxError, match="is outside every tensor"):
        transpose_kernel[(1,)](x, torch.empty(48, 64), M=64, N=32)


def test_swapped_operand():
    """No access is wrong then: the numbers are."""

    def swap(source):
        return re.sub(r"sub\.f32(\s+%r\d+), (%r\d+), (%r\d+);", r"sub.f32\1, \3, \2;", source)

    out, _, expected = distance(rewrite=swap)
    assert torch.equal(out, -expected)
    inputs = test_maskd_loss.make([(2, 24, 8, 16)], weighted=False)
    with execution(rewrite=swap), pytest.raises(AssertionError, match="worst at"):
        test_maskd_loss.check(inputs)


def test_memory_that_nobody_wrote():
    with execution(), pytest.raises(PtxError, match=r"global address .*pointer 0, .* is read, but nobody wrote it"):
        transpose_kernel[(1,)](torch.empty(64, 32), torch.empty(32, 64), M=64, N=32)
    with pytest.raises(PtxError, match=r"shared address .* is read, but nobody wrote it"):
        distance(rewrite=lambda source: re.sub(r"[^\n]*st\.shared[^\n]*", "", source))


def test_two_blocks_write_one_word():
    with execution(rewrite=replaced("%ctaid.x", "%ctaid.y", -1)):
        x = torch.randn(1024)
        with pytest.raises(PtxError, match="race on global address"):
            distance_kernel[(2,)](x, x, torch.empty(1024), torch.empty(2), 1024, 0, BLOCK=512, HINT=1)


def test_an_unknown_instruction_is_named():
    with pytest.raises(PtxError, match=r"instruction not covered: sub\.rz\.f32 %r"):
        distance(rewrite=replaced("sub.f32", "sub.rz.f32"))


def test_divergent_branch():
    branch = "mov.u32 %r999, %tid.x; setp.lt.u32 %p99, %r999, 16; @%p99 bra $L__over;\n$L__over:\n"
    with pytest.raises(PtxError, match="divergent branch"):
        distance(rewrite=lambda source: source.replace("$L__tmp0:", branch + "$L__tmp0:", 1))


def test_grid_beyond_the_limits():
    x = torch.randn(128)
    with execution(), pytest.raises(PtxError, match="beyond the limits"):
        block_kernel[(1, 65536)](x, torch.empty(256), BLOCK=128)


def exactly(a, b, c):
    """a·b + c of float32, rounded once."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    nearest = np.float32(float(exact))
    neighbours = {nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))}
    return min(neighbours, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def test_fused_multiply_add_rounds_once():
    bits = np.random.default_rng(0).integers(0, 1 << 32, (3, 4000), dtype=np.uint32)
    a, b, c = ((x & 0x8FFFFFFF | 0x38000000).view(np.float32) for x in bits)
    # Sums that float64 rounds to a tie between two float32, and results without a leading bit.
    a[:3], b[:3], c[:3] = 1 + 2.0**-12, 1 + 2.0**-12, [2.0**-60, -(2.0**-60), 0]
    a[3:5], b[3:5], c[3:5] = 2.0**-100, [2.0**-48, 1.5 * 2.0**-48], [2.0**-149, 2.0**-140]
    a[5], b[5], c[5] = 2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 - 2.0**-24), 2.0**-126
    got = ptx_arithmetic.find("fma.rn.f32").function(a, b, c)
    expected = np.array([exactly(*x) for x in zip(a, b, c, strict=True)], np.float32)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_pytorch_does(dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int64).to(torch.int32)
    bits[:1000] = (bits[:1000] & ~0xFFFF) | 0x8000  # ties
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    half = ptx_arithmetic.find(f"cvt.rn.{kind}.f32").function(x.numpy())
    assert np.array_equal(half.view(np.int16), x.to(dtype).view(torch.int16).numpy())
    assert np.array_equal(ptx_arithmetic.find(f"cvt.f32.{kind}").function(half), x.to(dtype).float().numpy())


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("shl.b32", (1, 31), 1 << 31),
        ("shl.b32", (1, 32), 0),
        ("shr.s32", (-8, 40), -1),
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("mul.hi.s32", (1 << 30, -8), -2),
        ("mad.wide.s32", (-3, 4, 5), -7),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.s32", (0xABCD, 4, 8), 0xBC - 256),
        ("bfi.b32", (0xF, 0xAAAA0000, 4, 4), 0xAAAA00F0),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7410), 0x77441100),
        ("lop3.b32", (0b1100, 0b1010, 0b0110, 0x96), 0b1100 ^ 0b1010 ^ 0b0110),
        ("popc.b32", (0xF0F00001,), 9),
        ("clz.b32", (1,), 31),
        ("shf.l.wrap.b32", (0x80000000, 1, 1), 3),
        ("cvt.rzi.s32.f32", (-2.7,), -2),
        ("cvt.rna.tf32.f32", (1 + 2.0**-11,), 0x3F802000),
        ("setp.num.f32", (1.0, float("nan")), False),
        ("setp.ltu.f32", (1.0, float("nan")), True),
        ("max.f32", (1.0, float("nan")), 1.0),
    ],
)
def test_arithmetic(opcode, operands, expected):
    operation = ptx_arithmetic.find(opcode)
    arrays = [
        np.array([[x]]).astype(ptx_arithmetic.DTYPES[k]) for x, k in zip(operands, operation.operands, strict=True)
    ]
    assert operation.function(*arrays) == np.array(expected).astype(ptx_arithmetic.DTYPES[operation.result])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eq", [True, True, False, False]),
        ("neu", [False, False, True, True]),
        ("lt", [False, False, False, False]),
        ("leu", [True, True, False, True]),
    ],
)
def test_comparison_of_pairs(name, expected):
    """Two halves at a time, the lower one first."""
    low = np.array([0.0, -0.0, 1.0, np.nan], np.float16)
    high, zero = low[::-1], np.zeros(4, np.float16)
    source = f"""
.visible .entry kernel() .reqntid 32
{{
    .reg .pred %p<3>; .reg .b32 %r<3>;
    setp.{name}.f16x2 %p1|%p2, %r1, %r2;
}}"""
    program = parse(source)
    pairs = [np.stack(x, 1).reshape(1, -1).view(np.uint32) for x in ((low, high), (zero, zero))]
    batch = SimpleNamespace(registers=dict(zip(("%r1", "%r2"), pairs, strict=True)))
    make_step(program.instructions[0], program)(batch)
    assert batch.registers["%p1"].tolist() == [expected]
    assert batch.registers["%p2"].tolist() == [expected[::-1]]
