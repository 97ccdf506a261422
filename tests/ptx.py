"""Executes the PTX of compiled Triton kernels on CPU tensors, and checks what compute-sanitizer would.

All threads of a block, and many blocks, run side by side as NumPy arrays [blocks, threads]; what is the same for all
threads, or all blocks, is an array of size 1 along that axis. Reported, as ``PtxError``, are

- an instruction that is not covered, by name;
- a branch on which threads of a block disagree (the rule of hardware, that those of a warp agree, is laxer);
- an access outside the elements of the tensors given, or not aligned to its width;
- a read of shared or global memory that nobody wrote. Memory that PyTorch did not initialise holds NaN, or the largest
  integer: ``execution`` sees to that;
- two threads of a block touching one word, shared or global, one of them writing, with no barrier between; threads of
  a warp too, which ``bar.warp.sync`` orders. One instruction may store a value that several threads hold into one word
  of shared memory, as Triton has it; where threads of one warp hold it with unlike last bits, which one stays is the
  machine's affair, and the kernel's name is put down in ``Executor.unlike``;
- two blocks of a launch touching one word of global memory, likewise;
- a grid, a block or shared memory beyond the limits of the architecture.

Arithmetic: ptx_arithmetic.py. It rounds as PTX says, but leaves separate multiplications and additions separate, which
the assembler may fuse; approximate functions are exact to the last bit; products of tensor cores are added in float64.
"""

import contextlib
import functools
import re
from typing import NamedTuple

import numpy as np
import torch
from ptx_memory import INSIDE, SHARED_BASE, WARP, GlobalMemory, Log, Memory, PtxError
from ptx_steps import END, make_step
from triton.runtime import driver

from bench.compiled import Driver
from maskd_kernels import backends, use_backend
from maskd_kernels.triton.launch import _Call

THREADS = 1024
GRID = (2**31 - 1, 65535, 65535)
SHARED_BYTES = {80: 163 << 10}
LANES = 1 << 14  # side by side: what keeps registers in a core's cache


# ---- Source ------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    guard: tuple[str, bool] | None  # predicate register, and whether it is to be false
    opcode: str
    operands: tuple  # strings; tuples of them: vectors; Address
    text: str
    position: int


class Address(NamedTuple):
    base: str
    offset: int


class Program(NamedTuple):
    parameters: tuple[tuple[str, str], ...]  # name and type
    threads: int  # of a block
    registers: dict[str, int]  # bits, by prefix
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def word_of(self, space):
        """Bytes of the narrowest access to this memory: what races are looked for in."""
        widths = [4]
        for opcode in (i.opcode for i in self.instructions if space in i.opcode):
            if opcode.startswith("ldmatrix"):
                widths.append(2 if ".trans" in opcode else 4)
            elif opcode.startswith(("ld.", "st.")):
                widths.append(int(re.search(r"\d+$", opcode).group()) // 8)
        return min(widths)


def parse_operands(text):
    operands = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        part = part.strip()
        if part[0] == "{":
            operands.append(tuple(x.strip() for x in part[1:-1].split(",")))
        elif part[0] == "[":
            base, offset = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", part).groups()
            operands.append(Address(base, int(offset or "0", 0)))
        else:
            operands.extend(part.split("|"))
    return tuple(operands)


def parse(source):
    """The one kernel of a PTX module."""
    source = re.sub(r"//[^\n]*", "", source)
    head, body = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\n\}", source, re.DOTALL).groups()
    parameters = tuple(
        (name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head.strip())
    )
    directives, body = body.split("{", 1)
    threads = int(re.search(r"\.reqntid\s+(\d+)", directives).group(1))
    body = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", body, flags=re.MULTILINE)
    registers, instructions, labels = {}, [], {}
    for label, statement in re.findall(r"([$\w]+):|([^;:]+);", body):
        statement = " ".join(statement.split())
        if label:
            labels[label] = len(instructions)
        elif match := re.fullmatch(r"\.reg \.(pred|[bfsu](\d+)) (%\w+?)<\d+>", statement):
            registers[match.group(3)] = int(match.group(2) or 1)
        elif not re.fullmatch(r'\.pragma "nounroll"', statement):
            guard, opcode, rest = re.fullmatch(r"(?:@(!?%\w+) )?([\w.:]+)(.*)", statement).groups()
            predicate = (guard.lstrip("!"), guard[0] == "!") if guard else None
            instructions.append(Instruction(predicate, opcode, parse_operands(rest), statement, len(instructions)))
    return Program(parameters, threads, registers, tuple(instructions), labels)


# ---- Execution ---------------------------------------------------------------------------------


class Batch:
    """Blocks that are at the same instruction."""

    def __init__(self, launch, blocks, registers, logs, copies):
        self.launch, self.blocks, self.registers, self.logs, self.copies = launch, blocks, registers, logs, copies
        threads = launch.program.threads
        self.shape = (len(blocks), threads)
        self.lanes = blocks[:, None] * threads + np.arange(threads)  # [blocks, threads], of all in the launch

    def take(self, chosen):  # [blocks]
        """A batch of some of the blocks."""
        blocks, threads = self.blocks[chosen], self.launch.program.threads
        registers = {name: x[chosen] if len(x) > 1 else x for name, x in self.registers.items()}
        logs = {name: log.of(blocks, threads) for name, log in self.logs.items()}
        copies = [[copy.of(blocks, threads) for copy in group] for group in self.copies]
        return Batch(self.launch, blocks, registers, logs, copies)

    def barrier(self):
        for log in self.logs.values():
            log.memory.finish_epoch(log.block_barrier(), self.launch.program.threads)

    def locate(self, space, address, mask, nbytes, write, instruction):
        """Of the active threads: where their first bytes are, checked and logged, and who they are."""
        memory = self.launch.memory[space]
        addresses = np.broadcast_to(address, self.shape)
        rows = np.broadcast_to((self.blocks - self.launch.first)[:, None], self.shape)
        chosen = ... if mask is None else np.broadcast_to(mask, self.shape)
        addresses, rows, lanes = (np.ravel(x[chosen]) for x in (addresses, rows, self.lanes))
        index = memory.locate(addresses, rows if space == "shared" else 0, nbytes)
        self.log(space, index, nbytes, lanes, write, instruction)
        return index, lanes

    def log(self, space, index, nbytes, lanes, write, instruction):
        words = self.launch.memory[space].touched(index, nbytes)
        self.logs[space].add(words.ravel(), np.repeat(lanes, words.shape[1]), write, instruction)

    def store(self, space, address, mask, width, values, instruction):
        """Stores; what threads of a block do at once to one word of shared memory is merged where it is no race."""
        index, _ = self.locate(space, address, mask, width * values.shape[1], True, instruction)
        memory = self.launch.memory[space]
        memory.write(index, width, values)
        if space == "shared":
            same = (memory.read(index, width, values.shape[1]) == values).all(1)
            self.launch.unlike |= not same.all()
            self.logs[space].merge_last(same)


class Launch:
    """One kernel on its grid, with the values of its parameters."""

    def __init__(self, program, steps, grid, parameters, memory, shared_bytes):
        self.program, self.steps, self.grid, self.parameters = program, steps, grid, parameters
        self.shared_bytes = -(-shared_bytes // 16) * 16
        self.memory, self.first = {"global": memory}, 0
        self.unlike = False  # whether threads of a warp stored unlike values into one word

    def run(self):
        blocks, threads = int(np.prod(self.grid)), self.program.threads
        side_by_side = max(1, LANES // threads)
        for self.first in range(0, blocks, side_by_side):
            here = np.arange(self.first, min(blocks, self.first + side_by_side))
            shared = Memory(
                "shared", SHARED_BASE, len(here) * self.shared_bytes, self.shared_bytes, self.program.word_of("shared")
            )
            shared.state[:] = INSIDE
            self.memory["shared"] = shared
            logs = {name: Log(memory) for name, memory in self.memory.items()}
            waiting = [(0, Batch(self, here, {}, logs, [[]]))]
            while waiting:
                waiting += self.advance(*waiting.pop())
        self.memory["global"].finish()

    def advance(self, at, batch):
        """Runs until the blocks end, or go different ways: which, and where."""
        while True:
            try:
                outcome = self.steps[at](batch)
                if outcome is END:
                    batch.barrier()
                    return []
            except (PtxError, KeyError, ZeroDivisionError, NotImplementedError) as error:
                reason = error if isinstance(error, PtxError) else f"{type(error).__name__} {error}"
                raise PtxError(f"{reason}; at: {self.program.instructions[at].text}") from error
            if outcome is None:
                at += 1
            elif isinstance(outcome, int):
                at = outcome
            else:
                return outcome


# ---- Launching ---------------------------------------------------------------------------------


@functools.cache
def steps_of(source):
    program = parse(source)
    return program, [make_step(i, program) for i in program.instructions]


def flatten(signature, arguments):
    """Types and values of what is passed at run time."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


INTEGERS = {"i1": "i1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u1": "u1", "u8": "u1", "u16": "u2"}
INTEGERS |= {"u32": "u4", "u64": "u8", "fp32": "f4", "f32": "f4"}


def tensor_at(address, tensors):
    """What begins at an address, or the rest of what it lies in; None for memory of no size."""
    for x in sorted(tensors, key=lambda x: -x.data_ptr()):
        first = (address - x.data_ptr()) // x.element_size()
        if 0 <= first < x.numel():
            return x.view(-1)[first:] if first else x
    return None


def execute(source, grid, threads, signature, arguments, shared_bytes, architecture=80, tensors=()):
    """Runs the kernel of a PTX module on CPU tensors; ``PtxError`` where it does what it must not.

    Addresses among the arguments are those of ``tensors``, or lie in them.
    """
    program, steps = steps_of(source)
    if any(not 0 < size <= most for size, most in zip(grid, GRID, strict=True)):
        raise PtxError(f"grid {grid} is beyond the limits {GRID}")
    if program.threads != threads or threads > THREADS or threads % WARP:
        raise PtxError(f"a block of {threads} threads, of a kernel for {program.threads}, at most {THREADS}")
    if shared_bytes > SHARED_BYTES[architecture]:
        raise PtxError(f"{shared_bytes} bytes of shared memory, at most {SHARED_BYTES[architecture]}")
    values = [*flatten(signature, arguments)]
    values += [("scratch", None)] * min(len(program.parameters) - len(values), 2)  # Triton 3.4 has one of these
    values = [(k, tensor_at(x, tensors) if k[0] == "*" and isinstance(x, int) else x) for k, x in values]
    memory = GlobalMemory([x for _, x in values if isinstance(x, torch.Tensor)], program.word_of("global"))
    parameters = {}
    for (name, _), (kind, value) in zip(program.parameters, values, strict=True):
        if kind[0] == "*" or kind == "scratch":
            address = 0 if value is None else memory.address(value)
            parameters[name] = np.array(address, "u8").tobytes()
        else:
            parameters[name] = np.array(value, INTEGERS[kind]).tobytes()
    with np.errstate(all="ignore"):
        launch = Launch(program, steps, grid, parameters, memory, shared_bytes)
        launch.run()
    return launch


class Executor(Driver):
    """Where Triton's driver would launch, executes. ``rewrite`` may change the PTX before."""

    def __init__(self, architecture=80, rewrite=lambda source: source):
        super().__init__(architecture)
        self.rewrite, self.unlike = rewrite, set()
        self.tensors = []  # of the call that is being repeated

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            active = driver.active  # a compiled kernel keeps the launcher that it got first
            cached = source.fn.device_caches[active.architecture][0].values()
            ptx = next(kernel.asm["ptx"] for kernel in cached if kernel.src is source)
            active.launches.append(source.fn.__name__)
            block, signature = metadata.num_warps * WARP, source.signature.values()
            try:
                done = execute(
                    active.rewrite(ptx), (x, y, z), block, signature, arguments, metadata.shared, tensors=active.tensors
                )
            except PtxError as error:
                raise PtxError(f"{source.fn.__name__}: {error}") from error
            if done.unlike:
                active.unlike.add(f"{source.fn.module.rpartition('.')[2]}.{source.fn.__name__}")

        return launch


@contextlib.contextmanager
def execution(**options):
    """Within it the operators run compiled, on CPU tensors; new memory is filled with what nobody writes."""
    before = backends.why_no_triton, torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    executor, repeat = Executor(**options), _Call.repeat

    def watched(call, tensors, addresses):
        executor.tensors = tensors
        return repeat(call, tensors, addresses)

    try:
        _Call.repeat = watched
        driver.set_active(executor)
        backends.why_no_triton = lambda device_type: None
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with use_backend("triton"):
            yield executor
    finally:
        _Call.repeat = repeat
        backends.why_no_triton, torch.utils.deterministic.fill_uninitialized_memory = before
        backends._resolved.cache_clear()
        torch.use_deterministic_algorithms(deterministic)
