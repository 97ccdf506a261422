"""Shared and global memory of ptx.py, and what may be wrong with accesses to it."""

import ctypes

import numpy as np
import torch

WARP = 32
SHARED_BASE = 1024  # not 0: nothing lies there
GLOBAL_BASE = 0x7F0000000000
GUARD = 512  # bytes between tensors, and PyTorch's alignment of GPU memory
INSIDE, WRITTEN = 1, 2  # of a byte of memory


class PtxError(Exception):
    """What a compiled kernel does wrong, or what cannot be executed."""


class Log:
    """Accesses to a memory since the last barrier, and whether two threads that it would have ordered met."""

    def __init__(self, memory):
        self.memory, self.since_warp, self.before = memory, [], []

    def add(self, words, lanes, write, instruction):
        self.since_warp.append((words, lanes, write, instruction))

    def merge_last(self, same):  # [accesses]: whether it is their value that stayed
        """Stores by one instruction into one word: one thread's doing, unless warps store unlike values."""
        words, lanes, write, instruction = self.since_warp[-1]
        self.memory.owner[words] = lanes
        owner, same = self.memory.owner[words], np.repeat(same, len(words) // max(1, len(same)))
        kept = (owner == lanes) | (~same & (owner // WARP != lanes // WARP))
        self.since_warp[-1] = (words[kept], lanes[kept], write, instruction)

    def of(self, blocks, threads):
        """What these blocks did."""
        part = Log(self.memory)
        for source, target in ((self.since_warp, part.since_warp), (self.before, part.before)):
            for words, lanes, write, instruction in source:
                mine = np.isin(lanes // threads, blocks)
                target.append((words[mine], lanes[mine], write, instruction))
        return part

    def warp_barrier(self):
        self.memory.check_races(self.since_warp, 1)
        self.before += self.since_warp
        self.since_warp = []

    def block_barrier(self):
        self.memory.check_races(self.since_warp, 1)
        if self.before:
            self.memory.check_races(self.before + self.since_warp, WARP)
        accesses = self.before + self.since_warp
        self.since_warp, self.before = [], []
        return accesses


class Memory:
    """Bytes, and of each whether it may be touched and whether it was written."""

    def __init__(self, name, base, size, row_bytes, word):
        self.name, self.base, self.row_bytes, self.word = name, base, row_bytes, word
        self.data, self.state = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.owner, self.written = np.zeros(size // word, np.int32), np.zeros(size // word, bool)

    def locate(self, addresses, rows, width):
        """Index of the first byte, checked."""
        index = addresses.astype(np.int64) - self.base
        crooked = (addresses & addresses.dtype.type(width - 1)) != 0
        if crooked.any():
            raise PtxError(
                f"{self.name} address {self.describe(addresses[crooked][0])} is not aligned to {width} bytes"
            )
        outside = (index < 0) | (index > self.row_bytes - width)
        if outside.any():
            raise PtxError(f"{self.name} address {self.describe(addresses[outside][0])} is outside")
        return index + rows * self.row_bytes

    def words(self, index, width, count):
        """[accesses, count] positions in units of ``width`` bytes."""
        return (index // width)[:, None] + np.arange(count)

    def require(self, at, width, state, what):
        bits = (self.state.view(f"u{width}")[at] & (0x0101010101010101 * state % (1 << 8 * width))) ^ (
            0x0101010101010101 * state % (1 << 8 * width)
        )
        if bits.any():
            position = np.argwhere(bits)[0]
            raise PtxError(f"{self.name} address {self.describe_index(int(at[tuple(position)]) * width)} {what}")

    def read(self, index, width, count):  # [accesses, count]
        at = self.words(index, width, count)
        self.require(at, width, INSIDE, "is outside every tensor")
        self.require(at, width, WRITTEN, "is read, but nobody wrote it")
        return self.data.view(f"u{width}")[at]

    def write(self, index, width, values):  # [accesses, count]
        at = self.words(index, width, values.shape[1])
        self.require(at, width, INSIDE, "is outside every tensor")
        self.data.view(f"u{width}")[at] = values
        self.state.view(f"u{width}")[at] = 0x0303030303030303 % (1 << 8 * width)

    def forget(self, index, nbytes):
        """Something is on its way there."""
        self.state[self.words(index, 1, nbytes)] &= ~np.uint8(WRITTEN)

    def finish_epoch(self, accesses, threads):
        """Told of all accesses between two barriers of a block."""

    def touched(self, index, bytes_each):
        """The words, in units of races, of accesses of so many bytes."""
        return self.words(index, self.word, max(1, bytes_each // self.word))

    def check_races(self, accesses, unit):
        """No word was touched by two of ``unit`` threads side by side, one of them writing."""
        writes = [words for words, _, write, _ in accesses if write and len(words)]
        if not writes:
            return
        for words in writes:
            self.written[words] = True
        conflict = None
        # Only what was written matters of the reads.
        candidates = []
        for words, lanes, write, instruction in accesses:
            chosen = ... if write else self.written[words]
            candidates.append((words[chosen], lanes[chosen], instruction))
        for words, lanes, _ in candidates:
            self.owner[words] = lanes // unit
        for words, lanes, _ in candidates:
            lost = self.owner[words] != lanes // unit
            if lost.any():
                conflict = words[lost][0]
                break
        for words in writes:
            self.written[words] = False
        if conflict is not None:
            involved = {i.text for words, _, i in candidates if (words == conflict).any()}
            where = self.describe_index(int(conflict) * self.word)
            raise PtxError(f"race on {self.name} address {where}, no barrier between: {sorted(involved)}")

    def describe(self, address):
        return self.describe_index(int(address) - self.base)

    def describe_index(self, index):
        return hex(index % self.row_bytes)


class GlobalMemory(Memory):
    """The tensors of a launch, copied to addresses of their own, apart from each other."""

    def __init__(self, tensors, word):
        storages = {}
        for x in tensors:
            storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        storages.pop(0, None)
        self.places, size = {}, GUARD
        for pointer, nbytes in sorted(storages.items()):
            self.places[pointer] = (size + pointer % 16, nbytes)
            size += -(-(16 + nbytes) // GUARD) * GUARD + GUARD
        super().__init__("global", GLOBAL_BASE, size, size, word)
        self.reads, self.writer = [], np.zeros(size // word, np.int32)
        self.tensors = tensors
        for pointer, (start, nbytes) in self.places.items():
            self.data[start : start + nbytes] = host_memory(pointer, nbytes)
        for x in tensors:
            self.mark(x)

    def mark(self, x):
        """The elements of a tensor are there; those that hold what PyTorch fills new memory with, nobody wrote.

        Bools count as written: they have no value to spare.
        """
        if not x.numel():
            return
        offset = x.storage_offset() * x.element_size()
        start = self.places[x.untyped_storage().data_ptr()][0] + offset
        kind = f"u{x.element_size()}"
        strides = [s * x.element_size() for s in x.stride()]
        if x.is_floating_point():
            fresh = x.detach().isnan()
        elif x.dtype == torch.bool:
            fresh = torch.zeros_like(x)
        else:
            fresh = x == torch.iinfo(x.dtype).max
        state = np.ndarray(tuple(x.shape), kind, self.state.data, start, strides)
        state |= np.where(fresh.numpy(), 0x0101010101010101, 0x0303030303030303).astype(kind)

    def address(self, x):
        storage = x.untyped_storage().data_ptr()
        if not storage:
            return 0
        return GLOBAL_BASE + self.places[storage][0] + x.data_ptr() - storage

    def describe_index(self, index):
        for i, x in enumerate(self.tensors):
            distance = index + GLOBAL_BASE - self.address(x)
            if x.numel() and -GUARD <= distance < x.untyped_storage().nbytes() + GUARD:
                return f"{hex(GLOBAL_BASE + index)} (pointer {i}, {x.dtype} {list(x.shape)}, byte {distance})"
        return hex(GLOBAL_BASE + index)

    def finish_epoch(self, accesses, threads):
        """Remembers which block wrote a word, to find another that touched it."""
        for words, lanes, write, _ in accesses:
            block = lanes // threads + 1
            if not write:
                self.reads.append((words, block))
                continue
            before = self.writer[words]
            if ((before != 0) & (before != block)).any():
                raise self.block_race(words[(before != 0) & (before != block)])
            self.writer[words] = block
            if (self.writer[words] != block).any():
                raise self.block_race(words[self.writer[words] != block])

    def finish(self):
        """Writes everything back."""
        for words, block in self.reads:
            writer = self.writer[words]
            if ((writer != 0) & (writer != block)).any():
                raise self.block_race(words[(writer != 0) & (writer != block)])
        for pointer, (start, nbytes) in self.places.items():
            host_memory(pointer, nbytes)[:] = self.data[start : start + nbytes]

    def block_race(self, words):
        where = self.describe_index(int(words[0]) * self.word)
        return PtxError(f"race on global address {where}: two blocks touch it, one of them writing")


def host_memory(pointer, nbytes):
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), np.uint8)
