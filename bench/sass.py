"""Machine code of a compiled Triton kernel, counted: what a step of its loops over channels is made of.

A loop is found by its back-edge in the control flow of what nvdisasm prints. How many elements of the features one of
its steps reads is what Triton's own intermediate code says: the shapes of the loads in the loop it came from.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

WIDTH = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of a load; otherwise 4
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4}  # half types may be read two at a time

# By the opcode's beginning; the first that fits. Whatever is left over computes integers.
CLASSES = {
    "global": r"LDG(?!DEPBAR)|STG|LD\b|ST\b|UBLKCP|UTMA",
    "shared": r"LDS|STS|LDSM|STSM",
    "constant": r"LDC|ULDC|LDCU|S2R|S2UR|CS2R",
    "tensor": r"HMMA|HGMMA|UTC|IMMA|WARPGROUP|LDTM|STTM",
    "shuffle": r"SHFL|REDUX|VOTE|MATCH",
    "barrier": r"BAR\b|DEPBAR|LDGDEPBAR|SYNCS|MEMBAR|WARPSYNC|ERRBAR|FENCE|ARRIVES",
    "control": r"BRA|EXIT|CALL|RET|NOP|BREAK|BMOV|YIELD|BSSY|BSYNC",
    "convert": r"F2F|F2I|I2F|HADD2\.F32|I2FP",
    "float32": r"FADD|FMUL|FFMA|FMNMX|FSETP|FSEL|FSET|FCHK|MUFU|FSWZADD",
    "half": r"HADD2|HMUL2|HFMA2|HMNMX2|HSETP2",
}
# Shifts that make float32 of bfloat16.
BFLOAT16 = re.compile(
    r"IMAD\.(?:U32|SHL\S*) \w+, \w+(?:\.reuse)?, 0x10000,|LOP3\.LUT \w+, \w+(?:\.reuse)?, 0xffff0000,|SH\S*L\b.*, 0x10,"
)


class Instruction(NamedTuple):
    """Of machine code, or of PTX."""

    predicate: str
    opcode: str
    operands: str
    target: str | None  # of a branch
    falls_through: bool
    load_bytes: int  # of a lane, from global memory

    @property
    def kind(self) -> str:
        text = f"{self.opcode} {self.operands}"
        if BFLOAT16.match(text):
            return "convert"
        return next((kind for kind, pattern in CLASSES.items() if re.match(pattern, self.opcode)), "integer")


class Loop(NamedTuple):
    """One step of a loop over channels."""

    elements: float  # of each feature map, of a lane
    classes: dict[str, int]
    barriers: int  # that all warps of a block wait at
    bytes_in_flight: int  # of a lane: the most that its loads have under way

    @property
    def instructions(self) -> int:
        return sum(self.classes.values())


class Code(NamedTuple):
    instructions: int  # outside of the loops
    loops: list[Loop]  # where rows are whole vectors, and where not; empty where no features are walked
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int


def tool(name: str) -> str:
    """One of the programs that come with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> list[Instruction | str]:
    """Instructions, and labels between them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    result: list[Instruction | str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            result.append(label.group(1))
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            predicate, opcode, operands = found.group(1) or "", found.group(2), found.group(3).strip()
            to = re.search(r"`\((\.L_x_\d+)\)", operands) if opcode.startswith("BRA") else None
            always = not predicate and (not to or operands.startswith("`"))
            leaves = always and re.match(r"BRA|BRX|JMP|EXIT|RET", opcode) is not None
            size = 0
            if re.match(r"LDG\.|LDGSTS", opcode):
                size = next((WIDTH[part] for part in opcode.split(".") if part in WIDTH), 4)
            result.append(Instruction(predicate, opcode, operands, to and to.group(1), not leaves, size))
    return result


def parse_ptx(ptx: str) -> list[Instruction | str]:
    """As far as loops and what they load are concerned."""
    result: list[Instruction | str] = []
    for line in ptx.splitlines():
        if label := re.match(r"(\$L\w+):", line):
            result.append(label.group(1))
        elif found := re.match(r"\s+(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);", line):
            predicate, opcode, operands = found.group(1) or "", found.group(2), found.group(3)
            to = re.search(r"(\$L\w+)", operands) if opcode.startswith("bra") else None
            leaves = not predicate and re.match(r"bra|ret|exit", opcode) is not None
            size = 0
            if load := re.match(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)$", opcode):
                size = int(load.group(1) or 1) * int(load.group(2)) // 8
            elif re.match(r"cp\.async\.c[ag]\.", opcode):
                size = int(re.findall(r", (0x[0-9a-f]+|\d+)", operands)[0], 0)
            result.append(Instruction(predicate, opcode, operands, to and to.group(1), not leaves, size))
    return result


def loops(code: Sequence[Instruction | str]) -> list[list[Instruction]]:
    """Bodies of the innermost loops that read global memory, in the order of their addresses."""
    # Basic blocks, and which follow which.
    blocks: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}
    for item in code:
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            at[item] = len(blocks) - 1
        else:
            blocks[-1].append(item)
            if item.target or not item.falls_through:
                blocks.append([])
    after: list[set[int]] = [set() for _ in blocks]
    before: list[set[int]] = [set() for _ in blocks]
    for i, block in enumerate(blocks):
        if i + 1 < len(blocks) and (not block or block[-1].falls_through):
            after[i].add(i + 1)
        if block and block[-1].target in at:
            after[i].add(at[block[-1].target])
        for j in after[i]:
            before[j].add(i)

    def reach(start: int, steps: Sequence[set[int]], never: int = -1) -> set[int]:
        found, todo = {start}, [start]
        while todo:
            for j in steps[todo.pop()] - found - {never}:
                found.add(j)
                todo.append(j)
        return found

    bodies: dict[int, set[int]] = {}
    for i, following in enumerate(after):
        for head in following:
            if head <= i and i in (inside := reach(head, after)):
                body = {head} if head == i else (inside & reach(i, before, never=head)) | {head}
                bodies[head] = bodies.get(head, set()) | body
    # Code that branches back into a loop beside its head is the same loop.
    found = {frozenset(body) for body in bodies.values()}
    reading = [body for body in found if any(x.load_bytes for block in body for x in blocks[block])]
    innermost = [body for body in reading if not any(other < body for other in reading)]
    return [[x for i in sorted(body) for x in blocks[i]] for body in sorted(innermost, key=min)]


def width(body: Sequence[Instruction]) -> float:
    """Bytes of a load of global memory, on average."""
    loads = [x.load_bytes for x in body if x.load_bytes]
    return sum(loads) / len(loads)


def tiles(ttgir: str, reads: int, writes: int, item_bytes: int) -> list[int]:
    """Elements of each map that a step of each loop over features takes, all lanes together, in the code's order.

    Those that it writes, where it does, as loops over pixels read other tensors of the same shape; else what it reads.
    """
    operation = r"tt\.store" if writes else r"(?:tt\.load|ttg\.async_copy_global_to_local)"
    found: list[Counter[tuple[int, ...]]] = []
    stack: list[int | None] = []  # the loop that an opened region is
    for line in ttgir.splitlines():
        text = re.sub(r"\s*loc\([^()]*\)$", "", line).strip()
        if text.startswith("}"):
            stack.pop()
        inside = next((i for i in reversed(stack) if i is not None), None)
        load = re.search(rf"{operation} .*: tensor<((?:\d+x)+)!tt\.ptr<(\w+)>", text)
        size = ITEM_BYTES.get(load.group(2), 0) if load and (load.group(2) != "f32" or item_bytes == 4) else 0
        if load and inside is not None and size >= item_bytes:
            shape = (*(int(n) for n in load.group(1).split("x")[:-1]), size // item_bytes)
            found[inside][shape] += 1
        if text.endswith("{"):
            is_loop = re.search(r"\bscf\.(for|while)\b", text) is not None
            stack.append(len(found) if is_loop else None)
            if is_loop:
                found.append(Counter())
    result = []
    for shapes in found:
        totals = [_product(shape) * count for shape, count in shapes.items() if len(shape) > 2]
        if totals:
            result.append(max(totals) // (writes or reads))
    return result


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def _registers(operand: str, count: int) -> set[int]:
    found = re.match(r"[-|~!]*R(\d+)", operand)
    return set(range(int(found.group(1)), int(found.group(1)) + count)) if found else set()


def bytes_in_flight(body: Sequence[Instruction]) -> int:
    """The most bytes that a lane's loads have under way at once: each until its result is used, or waited for."""
    under_way: dict[int, tuple[set[int], int]] = {}
    copies: list[int] = []  # groups of copies into shared memory
    group = most = 0
    for number, x in enumerate([*body, *body]):
        parts = [part.strip() for part in re.split(r",", x.operands)]
        width = next((WIDTH[part] // 4 for part in x.opcode.split(".") if part in WIDTH and WIDTH[part] > 4), 1)
        used = set().union(*(_registers(part, 4 if x.kind == "tensor" else max(width, 1)) for part in parts))
        used |= {int(n) for n in re.findall(r"\bR(\d+)", x.operands)}
        under_way = {key: entry for key, entry in under_way.items() if not entry[0] & used}
        if x.opcode.startswith("LDGSTS"):
            group += x.load_bytes
        elif x.opcode.startswith("LDGDEPBAR"):
            copies.append(group)
            group = 0
        elif x.opcode.startswith("DEPBAR") and len(parts) > 1:
            keep = int(parts[1].split()[0], 16) if parts[1].startswith("0x") else 0
            copies = copies[len(copies) - min(keep, len(copies)) :]
        elif x.load_bytes:
            names = parts[:2] if x.load_bytes == 32 else parts[:1]
            registers = set().union(*(_registers(part, max(x.load_bytes // 4 // len(names), 1)) for part in names))
            under_way[number] = (registers, x.load_bytes)
        most = max(most, sum(size for _, size in under_way.values()) + sum(copies) + group)
    return most


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def count(kernel: Any, reads: int, writes: int, item_bytes: int) -> Code:
    """What a compiled kernel is made of, whose loops read and write so many feature maps of this size of an element."""
    used = resources(kernel.asm["cubin"])
    warps = kernel.metadata.num_warps
    code = disassemble(kernel.asm["cubin"])
    # Triton's own code has the loop for whole vectors first; what compilers make of it need not.
    bodies = sorted(loops(code), key=width, reverse=True) if reads else []
    sizes = tiles(kernel.asm["ttgir"], reads, writes, item_bytes) if reads else []
    written = sorted(loops(parse_ptx(kernel.asm["ptx"])), key=width, reverse=True) if reads else []
    if not len(bodies) == len(sizes) == len(written):
        found = f"{len(sizes)} in Triton's code, {len(written)} in PTX, {len(bodies)} in machine code"
        raise ValueError(f"{kernel.name}: expected the same loops over features everywhere, got {found}")
    counted = []
    for body, before, size in zip(bodies, written, sizes, strict=True):
        # The assembler unrolls short loops.
        unrolled = max(round(sum(x.load_bytes for x in body) / sum(x.load_bytes for x in before)), 1)
        elements = size * unrolled
        classes = Counter(x.kind for x in body)
        kinds = [*CLASSES, "integer"]
        counted.append(
            Loop(
                elements / (32 * warps),
                {k: classes[k] for k in kinds if classes[k]},
                sum(x.opcode.startswith("BAR") for x in body),
                bytes_in_flight(body),
            )
        )
    everything = sum(isinstance(x, Instruction) and x.opcode != "NOP" for x in code)
    return Code(
        everything - sum(loop.instructions for loop in counted),
        counted,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        kernel.metadata.shared,
        warps,
    )
