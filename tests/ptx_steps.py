"""What the instructions of ptx.py do that are not arithmetic: memory, barriers, branches, exchange, tensor cores.

A step is a function of a batch of blocks; it gives where to go on if that is not the next instruction.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
from ptx_arithmetic import COMPARISONS, DTYPES, comparison, find, from_bfloat16
from ptx_memory import SHARED_BASE, WARP, PtxError

PARAMETER_BYTES = 8  # from the address of a parameter to the next one's; the first is not at 0
POISON = 0xFF  # every byte of a register that was not set: NaN


class Copy(NamedTuple):
    """Of cp.async, not there yet."""

    index: np.ndarray  # [copies]: of the first byte
    values: np.ndarray  # [copies, 32-bit words]
    lanes: np.ndarray  # [copies]
    instruction: object

    def of(self, blocks, threads):
        mine = np.isin(self.lanes // threads, blocks)
        return Copy(self.index[mine], self.values[mine], self.lanes[mine], self.instruction)


END = object()
STEPS = []


def step(pattern):
    """Registers a maker of steps: called with the instruction, its program and the groups of the opcode."""

    def register(make):
        STEPS.append((re.compile(pattern), make))
        return make

    return register


def make_step(instruction, program):
    """A function of a batch that does what the instruction says."""
    if found := find(instruction.opcode):
        return arithmetic(instruction, program, found)
    for pattern, make in STEPS:
        if match := pattern.fullmatch(instruction.opcode):
            return make(instruction, program, *match.groups())
    raise PtxError(f"instruction not covered: {instruction.text}")


def width_of(register, program):
    return program.registers[re.match(r"%[a-z]+", register).group()]


def canonical(bits):
    return np.dtype(bool) if bits == 1 else np.dtype(f"u{bits // 8}")


def literal(text, kind):
    """[1, 1]"""
    dtype, text = np.dtype(DTYPES[kind]), text.removesuffix("U")
    if text == "global_smem":
        return np.full((1, 1), SHARED_BASE, dtype)
    if text.startswith("0f"):
        value = np.array([[int(text[2:], 16)]], np.uint32)
    elif kind == "pred":
        return np.array([[int(text, 0) != 0]])
    else:
        value = np.array([[int(text, 0) % (1 << 8 * dtype.itemsize)]], f"u{dtype.itemsize}")
    return value.view(dtype)


def special(name):
    """[blocks or 1, threads or 1] of special registers."""
    kind, _, axis = name[1:].partition(".")
    axis = "xyz".index(axis) if axis else 0

    def read(batch):
        x, y, _ = batch.launch.grid
        threads = batch.launch.program.threads
        if kind == "ctaid":
            value = (batch.blocks % x, batch.blocks // x % y, batch.blocks // (x * y))[axis][:, None]
        elif kind == "tid":
            value = np.arange(threads)[None] if axis == 0 else np.zeros((1, 1))
        elif kind == "laneid":
            value = np.arange(threads)[None] % WARP
        else:
            value = np.array([[batch.launch.grid[axis] if kind == "nctaid" else (threads, 1, 1)[axis]]])
        return value.astype(np.uint32)

    return read


def reader(operand, kind, program):
    """A function of a batch that gives the operand's values: [blocks or 1, threads or 1]."""
    dtype = np.dtype(DTYPES[kind])
    if re.fullmatch(r"%(tid|ctaid|nctaid|ntid)\.[xyz]|%laneid", operand):
        return special(operand)
    if operand[0] != "%":
        names = [name for name, _ in program.parameters]
        if operand in names:  # its address
            operand = str(PARAMETER_BYTES * (1 + names.index(operand)))
        value = literal(operand, kind)
        return lambda batch: value
    size = canonical(width_of(operand, program)).itemsize
    if size == dtype.itemsize:
        return lambda batch: batch.registers[operand].view(dtype)
    if size < dtype.itemsize:
        raise PtxError(f"{operand} is narrower than {kind}")
    return lambda batch: batch.registers[operand].astype(f"u{dtype.itemsize}").view(dtype)


def writer(operand, kind, program):
    """A function of a batch and values that sets the register, where it is wider by its sign."""
    dtype, target = np.dtype(DTYPES[kind]), canonical(width_of(operand, program))
    if target.itemsize < dtype.itemsize:
        raise PtxError(f"{operand} is narrower than {kind}")

    def write(batch, value):
        value = value.astype(target) if target.itemsize > dtype.itemsize else value.view(target)
        batch.registers[operand] = value

    return write


def guard(instruction):
    """A function of a batch: which threads take part, None for all."""
    if instruction.guard is None:
        return lambda batch: None
    name, negated = instruction.guard

    def read(batch):
        mask = batch.registers[name] != negated
        return None if mask.all() else mask

    return read


def merged(batch, operand, value, mask):
    """The new value where the mask is set, elsewhere the register's."""
    if mask is None:
        return value
    before = batch.registers.get(operand)
    if before is None:
        before = np.full((1, 1), POISON * 0x0101010101010101 % (1 << 8 * value.itemsize), f"u{value.itemsize}")
    return np.where(mask, value, before.view(value.dtype))


def arithmetic(instruction, program, found):
    target, *operands = instruction.operands
    if isinstance(target, tuple) or any(isinstance(x, tuple) for x in operands):
        return pack(instruction, program)
    if len(operands) != len(found.operands):
        raise PtxError(f"instruction not covered: {instruction.text}")
    reads = [reader(x, kind, program) for x, kind in zip(operands, found.operands, strict=True)]
    write, function, active = writer(target, found.result, program), found.function, guard(instruction)
    if instruction.guard is None:
        return lambda batch: write(batch, function(*[read(batch) for read in reads]))
    if np.dtype(DTYPES[found.result]).itemsize != canonical(width_of(target, program)).itemsize:
        raise PtxError(f"instruction not covered: {instruction.text}")

    def run(batch):
        write(batch, merged(batch, target, function(*[read(batch) for read in reads]), active(batch)))

    return run


def pack(instruction, program):
    """``mov`` between a register and its parts, the lowest first."""
    if not re.fullmatch(r"mov\.b(32|64)", instruction.opcode) or instruction.guard:
        raise PtxError(f"instruction not covered: {instruction.text}")
    target, source = instruction.operands
    whole, parts = (source, target) if isinstance(target, tuple) else (target, source)
    bits = int(instruction.opcode[5:])
    part_bits = bits // len(parts)
    distances = [np.array(i * part_bits, f"u{bits // 8}") for i in range(len(parts))]
    if isinstance(target, tuple):
        read = reader(whole, f"b{bits}", program)
        writes = [writer(part, f"b{part_bits}", program) if part != "_" else None for part in parts]

        def unpack(batch):
            value = read(batch)
            for write, distance in zip(writes, distances, strict=True):
                if write:
                    write(batch, (value >> distance).astype(canonical(part_bits)))

        return unpack
    reads, write = [reader(part, f"b{part_bits}", program) for part in parts], writer(whole, f"b{bits}", program)

    def join(batch):
        shifted = [read(batch).astype(canonical(bits)) << d for read, d in zip(reads, distances, strict=True)]
        write(batch, functools.reduce(np.bitwise_or, shifted))

    return join


@step(rf"setp\.{COMPARISONS}\.f16x2")
def compare_pairs(instruction, program, name):
    """Two predicates: of the lower halves, and of the upper ones."""
    *targets, a, b = instruction.operands
    if instruction.guard or len(targets) != 2:
        raise PtxError(f"instruction not covered: {instruction.text}")
    reads, compare = [reader(x, "f16x2", program) for x in (a, b)], comparison(name, "f16")

    def run(batch):
        pairs = [np.ascontiguousarray(read(batch)) for read in reads]
        halves = [x.view(np.float16).reshape(*x.shape, 2) for x in pairs]
        for i, target in enumerate(targets):
            batch.registers[target] = compare(*[x[..., i] for x in halves])

    return run


# Hints that change no result.
HINTS = r"((?:\.(?:L1::evict_\w+|L1::no_allocate|L2::cache_hint|L2::(?:64|128|256)B|ca|cg|cs|wb|wt))*)"


@step(r"createpolicy\.fractional\.L2::evict_\w+(?:\.L2::evict_\w+)?\.b64")
def create_policy(instruction, program):
    write = writer(instruction.operands[0], "b64", program)
    return lambda batch: write(batch, np.zeros((1, 1), np.uint64))


@step(r"ld\.param\.([busf](?:8|16|32|64))")
def load_parameter(instruction, program, kind):
    target, source = instruction.operands
    if instruction.guard:
        raise PtxError(f"instruction not covered: {instruction.text}")
    write, dtype = writer(target, kind, program), np.dtype(DTYPES[kind])
    address, names = address_reader(source, "param", program), [name for name, _ in program.parameters]

    def run(batch):
        at = address(batch)
        place, start = at // PARAMETER_BYTES - 1, at % PARAMETER_BYTES
        raw = [batch.launch.parameters[name] for name in names]
        sizes = np.array([*map(len, raw), 0])
        outside = start + dtype.itemsize > sizes[np.minimum(place, len(names))]
        if outside.any():
            raise PtxError(f"parameter address {at[outside][0]} is outside")
        table = b"".join(x.ljust(PARAMETER_BYTES, b"\0") for x in raw)
        table = np.frombuffer(table, np.uint8).reshape(-1, PARAMETER_BYTES)
        taken = table[place[..., None], start[..., None] + np.arange(dtype.itemsize)]
        write(batch, np.ascontiguousarray(taken).view(dtype)[..., 0])

    return run


def address_reader(address, space, program):
    kind = "u64" if space == "global" else "u32"
    offset = np.array(address.offset % (1 << int(kind[1:])), DTYPES[kind])
    base = reader(address.base, kind, program)
    return lambda batch: base(batch) + offset


def without_policy(operands, hints, program):
    return operands[:-1] if "L2::cache_hint" in hints else operands


@step(rf"ld\.(global|shared){HINTS}(?:\.v([248]))?\.([busf](?:8|16|32|64))")
def load(instruction, program, space, hints, count, kind):
    target, source = without_policy(instruction.operands, hints, program)
    targets = target if isinstance(target, tuple) else (target,)
    if len(targets) != int(count or 1):
        raise PtxError(f"instruction not covered: {instruction.text}")
    width, dtype = int(kind[1:]) // 8, np.dtype(DTYPES[kind])
    active, address = guard(instruction), address_reader(source, space, program)
    writes = [writer(x, kind, program) for x in targets]

    def run(batch):
        mask = active(batch)
        index, _ = batch.locate(space, address(batch), mask, width * len(targets), False, instruction)
        values = batch.launch.memory[space].read(index, width, len(targets))
        for i, (x, write) in enumerate(zip(targets, writes, strict=True)):
            column = np.ascontiguousarray(values[:, i])
            if mask is None:
                value = column.reshape(batch.shape)
            else:
                value = np.zeros(batch.shape, column.dtype)
                value[np.broadcast_to(mask, batch.shape)] = column
                value = merged(batch, x, value, mask)
            write(batch, value.view(dtype))

    return run


@step(rf"st\.(global|shared){HINTS}(?:\.v([248]))?\.([busf](?:8|16|32|64))")
def store(instruction, program, space, hints, count, kind):
    target, source = without_policy(instruction.operands, hints, program)
    sources = source if isinstance(source, tuple) else (source,)
    if len(sources) != int(count or 1):
        raise PtxError(f"instruction not covered: {instruction.text}")
    width = int(kind[1:]) // 8
    active, address = guard(instruction), address_reader(target, space, program)
    reads = [reader(x, f"b{8 * width}", program) for x in sources]

    def run(batch):
        mask = active(batch)
        chosen = ... if mask is None else np.broadcast_to(mask, batch.shape)
        values = [np.broadcast_to(read(batch), batch.shape)[chosen].ravel() for read in reads]
        batch.store(space, address(batch), mask, width, np.stack(values, 1), instruction)

    return run


@step(rf"cp\.async\.c[ag]\.shared(?:::cta)?\.global{HINTS}")
def copy_async(instruction, program, hints):
    """Bytes beyond ``source_bytes`` are zeros. Until waited for, nobody has written the target."""
    target, source, size, *source_size = without_policy(instruction.operands, hints, program)
    nbytes, active = int(size, 0), guard(instruction)
    to, source_address = address_reader(target, "shared", program), address_reader(source, "global", program)
    source_bytes = reader(source_size[0], "u32", program) if source_size else lambda _: np.full((1, 1), nbytes)

    def run(batch):
        mask = active(batch)
        index, lanes = batch.locate("shared", to(batch), mask, nbytes, True, instruction)
        given = np.broadcast_to(source_bytes(batch), batch.shape)
        if not np.isin(given, (0, nbytes)).all():
            raise PtxError("instruction not covered: cp.async of a part")
        taken = (given == nbytes) if mask is None else (given == nbytes) & mask
        start, _ = batch.locate("global", source_address(batch), taken, nbytes, False, instruction)
        values = np.zeros((len(lanes), nbytes // 4), np.uint32)
        inside = taken.ravel() if mask is None else taken[np.broadcast_to(mask, batch.shape)]
        values[inside] = batch.launch.memory["global"].read(start, 4, nbytes // 4)
        batch.launch.memory["shared"].forget(index, nbytes)
        batch.copies[-1].append(Copy(index, values, lanes, instruction))

    return run


@step(r"cp\.async\.commit_group")
def commit_group(instruction, program):
    return lambda batch: batch.copies.append([])


@step(r"cp\.async\.(?:wait_group|wait_all)")
def wait_group(instruction, program):
    """All but the latest groups are there: written by the threads that asked for them."""
    pending = int(instruction.operands[0], 0) if instruction.operands else None

    def run(batch):
        if pending is None:
            batch.copies.append([])
        done, batch.copies = batch.copies[: -1 - (pending or 0)], batch.copies[-1 - (pending or 0) :]
        for copy in (copy for group in done for copy in group):
            batch.log("shared", copy.index, 4 * copy.values.shape[1], copy.lanes, True, copy.instruction)
            batch.launch.memory["shared"].write(copy.index, 4, copy.values)

    return run


def by_warp(x, batch):
    """[warps, 32]"""
    return np.broadcast_to(x, batch.shape).reshape(-1, WARP)


def all_of_warp(instruction, mask):
    if int(mask, 0) % (1 << 32) != 0xFFFFFFFF or instruction.guard:
        raise PtxError(f"not covered for a part of the warp: {instruction.text}")


@step(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def shuffle(instruction, program, mode):
    *targets, source, distance, clamp, members = instruction.operands
    all_of_warp(instruction, members)
    value, distance = reader(source, "b32", program), reader(distance, "u32", program)
    clamp, lane = int(clamp, 0), np.arange(WARP)
    segment, last = clamp >> 8 & 31, clamp & 31
    first, limit = lane & segment, (lane & segment) | (last & ~segment)
    write = writer(targets[0], "b32", program)

    def run(batch):
        values, by = by_warp(value(batch), batch), by_warp(distance(batch), batch).astype(np.int64) & 31
        moved = {"bfly": lane ^ by, "idx": first | (by & ~segment), "up": lane - by, "down": lane + by}[mode]
        valid = moved >= limit if mode == "up" else moved <= limit
        result = np.take_along_axis(values, np.where(valid, moved, lane), 1)
        write(batch, result.reshape(batch.shape))
        if len(targets) > 1:
            batch.registers[targets[1]] = valid.reshape(batch.shape)

    return run


@step(r"bar\.warp\.sync")
def warp_barrier(instruction, program):
    all_of_warp(instruction, instruction.operands[0])

    def run(batch):
        for log in batch.logs.values():
            log.warp_barrier()

    return run


@step(r"(?:bar|barrier)\.sync(?:\.aligned)?")
def block_barrier(instruction, program):
    if instruction.operands != ("0",) or instruction.guard:
        raise PtxError(f"instruction not covered: {instruction.text}")
    return lambda batch: batch.barrier()


@step(r"ret|exit")
def end(instruction, program):
    if instruction.guard:
        raise PtxError(f"instruction not covered: {instruction.text}")
    return lambda batch: END


@step(r"bra(?:\.uni)?")
def branch(instruction, program):
    target = program.labels[instruction.operands[0]]
    if instruction.guard is None:
        return lambda batch: target
    name, negated = instruction.guard

    def run(batch):
        taken = batch.registers[name] != negated
        if (taken != taken[:, :1]).any():
            raise PtxError("divergent branch: threads of a block disagree")
        taken = taken[:, 0]
        if taken.all():
            return target
        if not taken.any():
            return None
        return [(target, batch.take(taken)), (instruction.position + 1, batch.take(~taken))]

    return run


# ---- Tensor cores ------------------------------------------------------------------------------


@step(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def load_matrix(instruction, program, count, transposed):
    """Lanes 8m to 8m + 7 point to the rows of matrix m; each lane gets two neighbours of a row, or of a column."""
    target, source = instruction.operands
    if instruction.guard:
        raise PtxError(f"instruction not covered: {instruction.text}")
    address, writes = address_reader(source, "shared", program), [writer(x, "b32", program) for x in target]
    lane = np.arange(WARP)

    def run(batch):
        rows, memory = by_warp(address(batch), batch), batch.launch.memory["shared"]
        if (rows[:, : 8 * int(count)] & np.uint32(15)).any():
            raise PtxError("a row of a matrix is not aligned to 16 bytes")
        for i, write in enumerate(writes):
            if transposed:
                parts = []
                for j in range(2):
                    at = rows[:, 8 * i + 2 * (lane % 4) + j] + (2 * (lane // 4)).astype(np.uint32)
                    index, _ = batch.locate("shared", at.reshape(batch.shape), None, 2, False, instruction)
                    parts.append(memory.read(index, 2, 1)[:, 0].astype(np.uint32))
                value = parts[0] | (parts[1] << np.uint32(16))
            else:
                at = rows[:, 8 * i + lane // 4] + (4 * (lane % 4)).astype(np.uint32)
                index, _ = batch.locate("shared", at.reshape(batch.shape), None, 4, False, instruction)
                value = memory.read(index, 4, 1)[:, 0]
            write(batch, value.reshape(batch.shape))

    return run


def halves(register, kind):  # [warps, 32]
    """[warps, 32, elements of a register] in float64."""
    if kind == "tf32":
        return (register & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    parts = [(register & np.uint32(0xFFFF)).astype(np.uint16), (register >> np.uint32(16)).astype(np.uint16)]
    floats = [from_bfloat16(x) if kind == "bf16" else x.view(np.float16) for x in parts]
    return np.stack(floats, -1).astype(np.float64)


@step(r"mma\.sync\.aligned\.m16n8k(4|8|16)\.row\.col\.f32\.(tf32|bf16|f16)\.\2\.f32")
def multiply_matrices(instruction, program, depth, kind):
    """Lane 4g + t has rows g and g + 8 of A, and column g of B, at elements t (or 2t, 2t + 1) of each group."""
    if instruction.guard:
        raise PtxError(f"instruction not covered: {instruction.text}")
    target, *sources = instruction.operands
    a, b = ([reader(x, "b32", program) for x in names] for names in sources[:2])
    c, writes = [reader(x, "f32", program) for x in sources[2]], [writer(x, "f32", program) for x in target]
    lane, depth = np.arange(WARP), int(depth)
    pair = 1 if kind == "tf32" else 2
    if len(b) * 4 * pair != depth or len(a) != 2 * len(b):
        raise PtxError(f"instruction not covered: {instruction.text}")
    group, member = lane // 4, lane % 4
    k = pair * member[:, None] + np.arange(pair)  # [32, pair]

    def run(batch):
        warps = batch.shape[0] * batch.shape[1] // WARP
        left, right = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        for i, read in enumerate(a):
            values = halves(by_warp(read(batch), batch), kind)
            left[:, (group + 8 * (i % 2))[:, None], k + 4 * pair * (i // 2)] = values
        for i, read in enumerate(b):
            right[:, k + 4 * pair * i, group[:, None]] = halves(by_warp(read(batch), batch), kind)
        product, results = left @ right, []
        for i, (read, write) in enumerate(zip(c, writes, strict=True)):
            added = product[:, group + 8 * (i // 2), 2 * member + i % 2] + by_warp(read(batch), batch)
            results.append((write, added.astype(np.float32).reshape(batch.shape)))
        for write, result in results:
            write(batch, result)

    return run
