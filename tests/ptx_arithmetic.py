"""What PTX instructions compute on registers: functions of NumPy arrays, one element per thread.

``find`` gives for an opcode the type of its result, those of its operands and the function, or None for an opcode
that is not covered. Every modifier is matched in full, so that none is passed over.
"""

import re
from typing import NamedTuple

import numpy as np

DTYPES = {"pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64}
DTYPES |= {f"{kind}{bits}": np.dtype(f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {"bf16": np.dtype("uint16"), "tf32": np.dtype("uint32"), "bf16x2": np.dtype("uint32")}
DTYPES |= {"f16x2": np.dtype("uint32")}


class Operation(NamedTuple):
    result: str
    operands: tuple[str, ...]
    function: object


PATTERNS = []


def operation(pattern):
    """Registers a maker of operations: called with the groups of the opcode that matches."""

    def register(make):
        PATTERNS.append((re.compile(pattern), make))
        return make

    return register


def find(opcode):
    for pattern, make in PATTERNS:
        if match := pattern.fullmatch(opcode):
            return make(*match.groups())
    return None


# ---- Floating point ----------------------------------------------------------------------------


def flush(x):  # float32
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def flushing(ftz, function):
    return (lambda *x: flush(function(*map(flush, x)))) if ftz else function


@operation(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.(f32|f16)")
def float_arithmetic(name, ftz, kind):
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    return Operation(kind, (kind, kind), flushing(ftz, function))


def fused_multiply_add(a, b, c):  # float32
    """a·b + c rounded once. The product is exact in float64, the sum is not, and may then lie between two float32."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    result = total.astype(np.float32)
    halfway = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    halfway |= (np.abs(total) < np.finfo(np.float32).tiny) & (total != 0)
    if halfway.any():
        part = total - product
        lost = (product - (total - part)) + (c - part)
        # Rounded to odd instead: no tie is left that the lost part would have to break.
        away = np.where((lost > 0) == (total > 0), np.int64(1), np.int64(-1))
        bits = total.view(np.int64)
        odd = np.where((lost != 0) & (bits & 1 == 0) & np.isfinite(lost), bits + away, bits).view(np.float64)
        result = np.where(halfway, odd.astype(np.float32), result)
    return result


@operation(r"fma\.rn(\.ftz)?\.f32")
def fma(ftz):
    return Operation("f32", ("f32",) * 3, flushing(ftz, fused_multiply_add))


@operation(r"(neg|abs)(\.ftz)?\.f32")
def float_sign(name, ftz):
    return Operation("f32", ("f32",), flushing(ftz, np.negative if name == "neg" else np.abs))


@operation(r"(min|max)(\.ftz)?(\.NaN)?\.f32")
def float_extreme(name, ftz, nan):
    function = {
        ("min", None): np.fmin,
        ("max", None): np.fmax,
        ("min", ".NaN"): np.minimum,
        ("max", ".NaN"): np.maximum,
    }
    return Operation("f32", ("f32", "f32"), flushing(ftz, function[name, nan]))


@operation(r"div\.(?:approx|full|rn)(\.ftz)?\.f32")
def divide(ftz):
    return Operation("f32", ("f32", "f32"), flushing(ftz, np.divide))


def in_float64(function):
    """Rounded correctly, which is within the error that the approximate instruction is documented with."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


@operation(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh)\.approx(\.ftz)?\.f32")
def approximate(name, ftz):
    reciprocal_root = in_float64(lambda x: 1 / np.sqrt(x))
    functions = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "tanh": np.tanh}
    function = reciprocal_root if name == "rsqrt" else in_float64(functions[name])
    return Operation("f32", ("f32",), flushing(ftz, function))


@operation(r"(rcp|sqrt)\.rn(\.ftz)?\.f32")
def rounded(name, ftz):
    return Operation("f32", ("f32",), flushing(ftz, in_float64(np.reciprocal if name == "rcp" else np.sqrt)))


# ---- Conversions -------------------------------------------------------------------------------


def to_bfloat16(x):  # float32
    bits = x.view(np.uint32)
    rounded_bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded_bits).astype(np.uint16)


def from_bfloat16(bits):  # uint16
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tensor_float32(x):  # float32
    """Ten bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), bits + np.uint32(0x1000), bits) & np.uint32(0xFFFFE000)


def packed(to_half):
    return lambda high, low: (to_half(high).astype(np.uint32) << np.uint32(16)) | to_half(low)


def to_float16(x):
    return x.astype(np.float16).view(np.uint16)


@operation(r"cvt\.rn\.(bf16|f16)x2\.f32")
def convert_pair(kind):
    return Operation(f"{kind}x2", ("f32", "f32"), packed(to_bfloat16 if kind == "bf16" else to_float16))


SPECIAL_CONVERSIONS = {
    "cvt.rn.bf16.f32": Operation("bf16", ("f32",), to_bfloat16),
    "cvt.f32.bf16": Operation("f32", ("bf16",), from_bfloat16),
    "cvt.rna.tf32.f32": Operation("tf32", ("f32",), to_tensor_float32),
    "cvt.rn.f16.f32": Operation("f16", ("f32",), lambda x: x.astype(np.float16)),
    "cvt.f32.f16": Operation("f32", ("f16",), lambda x: x.astype(np.float32)),
}


@operation("(" + "|".join(map(re.escape, SPECIAL_CONVERSIONS)) + ")")
def convert_specially(opcode):
    return SPECIAL_CONVERSIONS[opcode]


@operation(r"cvt\.([us](?:8|16|32|64))\.([us](?:8|16|32|64))")
def convert_integer(to, source):
    return Operation(to, (source,), lambda x: x.astype(DTYPES[to]))


@operation(r"cvt\.rn\.f32\.([us](?:8|16|32))")
def integer_to_float(source):
    return Operation("f32", (source,), lambda x: x.astype(np.float32))


@operation(r"cvt\.r([zmpn])i\.([us]32)\.f32")
def float_to_integer(rounding, to):
    function = {"z": np.trunc, "m": np.floor, "p": np.ceil, "n": np.rint}[rounding]
    limits = np.iinfo(DTYPES[to])

    def convert(x):
        whole = function(np.where(np.isnan(x), 0, x).astype(np.float64))
        return np.clip(whole, limits.min, limits.max).astype(np.int64).astype(DTYPES[to])

    return Operation(to, ("f32",), convert)


# ---- Integers ----------------------------------------------------------------------------------


def widened(kind):
    bits = int(kind[1:])
    if bits == 64:
        raise KeyError(kind)
    return f"{kind[0]}{2 * bits}"


def truncating_division(a, b):
    """Towards zero. What a division by zero gives is the machine's affair: an error here."""
    if not b.all():
        raise ZeroDivisionError("integer division by zero")
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a))


@operation(r"(add|sub)\.([us](?:16|32|64))")
def integer_sum(name, kind):
    return Operation(kind, (kind, kind), np.add if name == "add" else np.subtract)


@operation(r"(min|max)\.([us](?:16|32|64))")
def integer_extreme(name, kind):
    return Operation(kind, (kind, kind), np.minimum if name == "min" else np.maximum)


@operation(r"mul\.lo\.([us](?:16|32|64))")
def multiply_low(kind):
    return Operation(kind, (kind, kind), np.multiply)


def multiply_wide(kind):
    wide = DTYPES[widened(kind)]
    return lambda a, b: a.astype(wide) * b


@operation(r"mul\.wide\.([us](?:16|32))")
def multiply_wide_operation(kind):
    return Operation(widened(kind), (kind, kind), multiply_wide(kind))


@operation(r"mul\.hi\.([us](?:16|32))")
def multiply_high(kind):
    product, bits = multiply_wide(kind), int(kind[1:])
    return Operation(kind, (kind, kind), lambda a, b: (product(a, b) >> bits).astype(DTYPES[kind]))


@operation(r"mad\.lo\.([us](?:16|32|64))")
def multiply_add_low(kind):
    return Operation(kind, (kind,) * 3, lambda a, b, c: a * b + c)


@operation(r"mad\.wide\.([us](?:16|32))")
def multiply_add_wide(kind):
    product = multiply_wide(kind)
    return Operation(widened(kind), (kind, kind, widened(kind)), lambda a, b, c: product(a, b) + c)


@operation(r"(div|rem)\.([us](?:16|32|64))")
def integer_division(name, kind):
    if name == "div":
        return Operation(kind, (kind, kind), truncating_division)
    return Operation(kind, (kind, kind), lambda a, b: a - truncating_division(a, b) * b)


@operation(r"(neg|abs)\.(s(?:16|32|64))")
def integer_sign(name, kind):
    return Operation(kind, (kind,), np.negative if name == "neg" else np.abs)


@operation(r"(and|or|xor)\.(b16|b32|b64|pred)")
def bitwise(name, kind):
    return Operation(kind, (kind, kind), {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name])


@operation(r"not\.(b16|b32|b64|pred)")
def complement(kind):
    return Operation(kind, (kind,), np.invert)


@operation(r"(shl|shr)\.([bus](16|32|64))")
def shift(name, kind, bits):
    """Distances beyond the width shift everything out, or copy the sign."""
    dtype, last = DTYPES[kind], int(bits) - 1

    def apply(x, distance):
        inside = np.minimum(distance, last).astype(dtype)
        shifted = x << inside if name == "shl" else x >> inside
        if kind[0] == "s" and name == "shr":
            return shifted
        return np.where(distance > last, dtype.type(0), shifted)

    return Operation(kind, (kind, "u32"), apply)


@operation(r"shf\.(l|r)\.(wrap|clamp)\.b32")
def funnel_shift(direction, mode):
    def apply(low, high, distance):
        distance = distance & np.uint32(31) if mode == "wrap" else np.minimum(distance, 32)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        distance = distance.astype(np.uint64)
        shifted = (both << distance) >> np.uint64(32) if direction == "l" else both >> distance
        return shifted.astype(np.uint32)

    return Operation("b32", ("b32", "b32", "u32"), apply)


@operation(r"bfe\.([us])(32|64)")
def bit_field_extract(sign, bits):
    bits = int(bits)

    def apply(x, position, length):
        wide = x.astype(object) if bits == 64 else x.astype(np.int64)
        position, length = position & 255, length & 255
        if (position + length > bits).any() or not length.all():
            raise NotImplementedError("bit field of no bits, or beyond the register")
        field = (wide >> position.astype(np.int64)) & ((np.int64(1) << length.astype(np.int64)) - 1)
        if sign == "s":
            field = field - ((field >> (length.astype(np.int64) - 1)) << length.astype(np.int64))
        return field.astype(DTYPES[f"{sign}{bits}"])

    if bits == 64:
        raise KeyError(bits)
    return Operation(f"{sign}{bits}", (f"{sign}{bits}", "u32", "u32"), apply)


@operation(r"bfi\.b32")
def bit_field_insert():
    def apply(field, x, position, length):
        position, length = np.minimum(position & 255, 32).astype(np.uint64), np.minimum(length & 255, 32)
        mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << position
        return ((x & ~mask) | ((field.astype(np.uint64) << position) & mask)).astype(np.uint32)

    return Operation("b32", ("b32", "b32", "u32", "u32"), apply)


@operation(r"popc\.b32")
def population_count():
    def apply(x):
        x = x - ((x >> np.uint32(1)) & np.uint32(0x55555555))
        x = (x & np.uint32(0x33333333)) + ((x >> np.uint32(2)) & np.uint32(0x33333333))
        return (((x + (x >> np.uint32(4))) & np.uint32(0x0F0F0F0F)) * np.uint32(0x01010101)) >> np.uint32(24)

    return Operation("u32", ("b32",), apply)


@operation(r"clz\.b32")
def leading_zeros():
    return Operation("u32", ("b32",), lambda x: np.uint32(32) - np.frexp(x.astype(np.float64))[1].astype(np.uint32))


@operation(r"lop3\.b32")
def three_input_logic():
    def apply(a, b, c, table):
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for row in range(8):
            if int(table.flat[0]) >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return Operation("b32", ("b32", "b32", "b32", "u32"), apply)


@operation(r"prmt\.b32")
def permute_bytes():
    def apply(a, b, selector):
        both, result = (b.astype(np.uint64) << np.uint64(32)) | a, np.uint64(0)
        for i in range(4):
            choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
            byte = np.where(choice & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result = result | (byte << np.uint64(8 * i))
        return result.astype(np.uint32)

    return Operation("b32", ("b32", "b32", "b32"), apply)


# ---- Comparison and choice ---------------------------------------------------------------------

ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def comparison(name, kind):
    if kind[0] != "f":
        return ORDERED.get(name, np.not_equal)
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "neu":
        return np.not_equal
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name.endswith("u"):
        return lambda a, b: ORDERED[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return ORDERED[name]


COMPARISONS = r"(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)"


@operation(rf"setp\.{COMPARISONS}\.([bus](?:16|32|64)|f32|f16)")
def set_predicate(name, kind):
    return Operation("pred", (kind, kind), comparison(name, kind))


@operation(rf"setp\.{COMPARISONS}\.(and|or|xor)\.([bus](?:16|32|64)|f32|f16)")
def set_combined_predicate(name, connective, kind):
    compare, combine = comparison(name, kind), getattr(np, f"logical_{connective}")
    return Operation("pred", (kind, kind, "pred"), lambda a, b, p: combine(compare(a, b), p))


@operation(r"selp\.([bus](?:16|32|64)|f32|f64)")
def select(kind):
    return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


@operation(r"mov\.([bus](?:16|32|64)|f32|f64|pred)")
def move(kind):
    return Operation(kind, (kind,), lambda x: x)
