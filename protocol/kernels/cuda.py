"""Selection on the device, so that only what is sent leaves it.

The contracts are those of ``protocol.kernels.cpu``, to the last bit of indices and values, for contiguous
vectors of float32 or float64 that begin at any element. ``top_k`` goes once over the vector:

1. A sample (one launch) gives a threshold that a few more than ``k`` elements reach.
2. One pass reads vector and residual, writes the sum, and leaves one bit for each element that reaches
   the threshold: 1/96 of the traffic, in the order of the elements, with nothing that can overflow.
3. The elements behind the bits are gathered in ascending order, and a radix select finds the k-th
   among them. If the sample misled, all elements are candidates and the sum is read again.

All of this is in the queue before the host waits, once, for the counts and the sum of squares. A
histogram over the whole vector in place of the sample would save no pass, since the elements have to be
read again once the bin is known; it would cost atomics on few addresses, because magnitudes crowd.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported) the same kernels run on
tensors of the CPU, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from protocol.errors import SettingsError

Picked = tuple[Tensor, Tensor, float]

WORDS = 128  # words of flags in a block of the pass; 4096 elements
BLOCK = 4096  # elements in a block of everything else
SAMPLE = 1 << 14  # magnitudes from which the threshold is estimated
SHARE = 16  # no sample from vectors that are smaller than so many samples
SLACK = 4.5  # standard deviations by which the sample may mislead
LARGEST_BLOCK = 1 << 15  # for block_top_k, which keeps a block in the registers of one multiprocessor


def kernels() -> tuple[Any, Any]:
    """The modules of Triton kernels: for selection, and for streams.

    Raises:
        SettingsError: Triton is not installed.
    """
    try:
        from protocol.kernels import gpu_bits, gpu_select
    except ModuleNotFoundError as error:
        raise SettingsError(f"tensors on a GPU need the extra carryover[gpu], which brings Triton ({error})") from error
    return gpu_select, gpu_bits


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Queue so many programs of a kernel on the device of the first argument.

    Products and sums are never fused: what a replica adds must not depend on where it adds it.
    """
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*arguments, enable_fp_fusion=False, **constants)


def _added(vector: Tensor, residual: Tensor | None, total: Tensor) -> tuple[Tensor, bool, bool]:
    """A pointer for the residual, whether it is added, and whether the sum is written."""
    if residual is None:
        return vector, False, total.data_ptr() != vector.data_ptr()
    return residual, True, True


def _integers(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The integers as wide as a dtype, and the number of their highest bit below the sign."""
    return (torch.int64, 62) if dtype == torch.float64 else (torch.int32, 30)


def _generous(count: float) -> int:
    """So many that ``count`` are expected to be fewer, up to the chance that SLACK leaves."""
    return int(count + SLACK * math.sqrt(count) + SLACK)


def _threshold(vector: Tensor, residual: Tensor | None, k: int) -> tuple[Tensor, int]:
    """The bits of a magnitude that at least ``k`` elements should reach, and for how many to make room."""
    n, (integers, top) = vector.numel(), _integers(vector.dtype)
    stride, rank = n // SAMPLE, _generous(SAMPLE * k / n)
    threshold = torch.zeros(1, dtype=integers, device=vector.device)
    if n < SHARE * SAMPLE or rank >= SAMPLE:
        return threshold, n
    added, add, _ = _added(vector, residual, vector)
    constants = {"add": add, "samples": SAMPLE, "top": top, "num_warps": 32}
    launch(kernels()[0].sample, 1, vector, added, threshold, stride, rank, **constants)
    return threshold, min(n, _generous(rank) * (stride + 1))


def _scan(
    vector: Tensor, residual: Tensor | None, total: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flags; how many are set up to the end of each block; how many elements are not zero; squares."""
    n = vector.numel()
    blocks = -(-n // (32 * WORDS))
    flags = torch.empty(blocks * WORDS, dtype=torch.int32, device=vector.device)
    counts = torch.empty(2, blocks, dtype=torch.int64, device=vector.device)
    squares = torch.empty(blocks, dtype=torch.float64, device=vector.device)
    added, add, write = _added(vector, residual, total)
    arguments = vector, added, total, threshold, flags, counts, squares, n, blocks
    launch(kernels()[0].scan, blocks, *arguments, add=add, write=write, words=WORDS, num_warps=8)
    return flags, counts[0].cumsum(0), counts[1].sum(), squares.sum()


def gather(flags: Tensor, ends: Tensor, values: Tensor | None, room: int) -> tuple[Tensor, Tensor]:
    """Places of the bits set in ``flags``, ascending, and the values there; what is beyond ``room`` is left out.

    Args:
        flags: int32, a multiple of WORDS of them, the lowest bit first.
        ends: int64, how many bits are set up to the end of each block of WORDS.
        values: what to read at the places; None for nothing.
        room: the size of what is returned, of which only the bits that are set have been filled.
    """
    found = torch.empty(room, dtype=torch.int64, device=flags.device)
    read = flags if values is None else values
    kept = torch.empty(0 if values is None else room, dtype=read.dtype, device=flags.device)
    constants = {"words": WORDS, "with_values": values is not None, "num_warps": 4}
    launch(kernels()[1].gather, ends.numel(), flags, ends, read, found, kept, room, **constants)
    return found, kept


def _refine(values: Tensor, places: Tensor | None, size: Tensor, room: int, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest among the first ``size`` candidates, of which ``room`` at most are looked at.

    Means nothing unless there are ``k`` that are not zero; ``size`` stays on the device.
    """
    device, (select, _) = values.device, kernels()
    blocks, levels = -(-room // BLOCK), values.element_size()
    constants = {"levels": levels, "tile": BLOCK, "num_warps": 8}
    tallies = torch.zeros(levels, 256, dtype=torch.int64, device=device)
    for level in range(levels):
        launch(select.tally, blocks, values, size, tallies, room, k, level, **constants)
    counts = torch.empty(2, blocks, dtype=torch.int64, device=device)
    launch(select.count, blocks, values, size, tallies, counts, room, k, blocks, **constants)
    indices = torch.empty(k, dtype=torch.int64, device=device)
    kept = torch.empty(k, dtype=values.dtype, device=device)
    read = indices if places is None else places
    arguments = values, read, size, tallies, counts, counts.cumsum(1), indices, kept, room, k, blocks
    launch(select.refine, blocks, *arguments, with_places=places is not None, **constants)
    return indices, kept


def _fetch(*numbers: Tensor) -> list[int]:
    """Numbers of eight bytes from the device; here the host waits."""
    return torch.stack([number.view(torch.int64) for number in numbers]).tolist()


def _float(bits: int) -> float:
    return torch.tensor(bits).view(torch.float64).item()


def top_k(vector: Tensor, residual: Tensor | None, total: Tensor, k: int) -> Picked:
    """The ``k`` largest ``|vector + residual|``: ascending indices, values, and ``|vector + residual|**2``.

    Zeros are never selected, so there may be fewer than ``k``; ties go to the lowest index. If the
    squares are not finite, nothing is selected. The host waits once.

    Args:
        vector: shape ``(n,)``, ``n >= 1``, float32 or float64, contiguous.
        residual: the same, or None for zeros.
        total: receives ``vector + residual``; may be ``vector`` itself if there is no residual.
        k: at least 1 and at most ``n``.

    Raises:
        SettingsError: Triton is not installed.
    """
    n = vector.numel()
    threshold, room = _threshold(vector, residual, k)
    flags, ends, nonzero, squares = _scan(vector, residual, total, threshold)
    found, values = gather(flags, ends, total, room)
    indices, kept = _refine(values, found, ends[-1:], room, k)
    candidates, others, bits = _fetch(ends[-1], nonzero, squares)
    size, square = min(k, others), _float(bits)
    if not math.isfinite(square):
        return indices[:0], kept[:0], square
    if candidates < size or candidates > room:  # the sample misled
        everything = torch.full((1,), n, device=vector.device)
        return *_refine(total, None, everything, n, size), square
    if candidates <= k:
        return found[:candidates], values[:candidates], square
    return indices, kept, square


def at_least(vector: Tensor, residual: Tensor | None, total: Tensor, threshold: float) -> Picked:
    """The elements of ``vector + residual`` whose magnitude reaches a threshold, zeros never; as ``top_k``.

    The threshold is rounded to the dtype of the vector first. The host waits once, in the middle, for
    how many there are.
    """
    integers, _ = _integers(vector.dtype)
    least = int(torch.tensor(max(threshold, 0.0), dtype=vector.dtype).abs().view(integers))
    given = torch.full((1,), least, dtype=integers, device=vector.device)  # a copy would make the host wait
    flags, ends, _, squares = _scan(vector, residual, total, given)
    size, bits = _fetch(ends[-1], squares)
    square = _float(bits)
    found, kept = gather(flags, ends, total, size if math.isfinite(square) else 0)
    return found, kept, square


def block_top_k(vector: Tensor, residual: Tensor | None, total: Tensor, block: int, k: int, k_last: int) -> Picked:
    """The ``k`` largest of each ``block`` elements, ``k_last`` of a last one that is not full; as ``top_k``.

    One pass; a block stays in registers while its k-th magnitude is found. The host waits once, and
    once more if some block has fewer elements that are not zero than it may send.

    Args:
        vector: as for ``top_k``.
        residual: as for ``top_k``.
        total: as for ``top_k``.
        block: elements in a block, LARGEST_BLOCK at most.
        k: at least 1 and at most ``block``.
        k_last: at most what the last block has; of no meaning if that is full.

    Raises:
        SettingsError: Triton is not installed, or the block is too large.
    """
    if block > LARGEST_BLOCK:
        raise SettingsError(f"blocks of {block} elements are too large for the GPU; valid is at most {LARGEST_BLOCK}")
    n, top = vector.numel(), _integers(vector.dtype)[1]
    full, rest = divmod(n, block)
    blocks, size = full + (rest > 0), full * k + (k_last if rest else 0)
    indices = torch.empty(size, dtype=torch.int64, device=vector.device)
    kept = torch.empty(size, dtype=vector.dtype, device=vector.device)
    counts = torch.empty(blocks, dtype=torch.int64, device=vector.device)
    squares = torch.empty(blocks, dtype=torch.float64, device=vector.device)
    added, add, write = _added(vector, residual, total)
    arguments = vector, added, total, indices, kept, counts, squares, n, block, k, k_last
    tile = 1 << (block - 1).bit_length()
    constants = {"add": add, "write": write, "tile": tile, "top": top}
    # few enough registers that the reductions of one block of 4096 overlap the loads of another
    launch(
        kernels()[0].block_top_k, blocks, *arguments, **constants, num_warps=min(32, max(1, tile // 256)), maxnreg=64
    )
    found, bits = _fetch(counts.sum(), squares.sum())
    square = _float(bits)
    if not math.isfinite(square):
        return indices[:0], kept[:0], square
    if found < size:
        filled = indices >= 0
        indices, kept = indices[filled], kept[filled]
    return indices, kept, square
