"""Index and digit streams on the device: the bytes are those of the codes on the CPU.

Nothing but the finished stream has to leave the device, and of a stream that arrived nothing but
whether it is valid. As in ``protocol.kernels.cuda``, Triton's interpreter runs this on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protocol.coding.digits import per_byte
from protocol.coding.rice import MAX_PARAMETER
from protocol.errors import DecodeError
from protocol.kernels.cuda import WORDS, gather, kernels, launch

BLOCK = 1024  # places of a program


def _launch(kernel: Any, size: int, *arguments: Any, **constants: Any) -> None:
    """Queue enough programs of a kernel for ``size`` places."""
    launch(kernel, -(-size // BLOCK), *arguments, **constants, tile=BLOCK, num_warps=4)


def _quotients(indices: Tensor, lowest: int, widths: int) -> Tensor:
    """Sums of ``gap >> b`` for ``widths`` parameters from ``lowest`` on: shape ``(widths, blocks)``, int64."""
    blocks = -(-indices.numel() // BLOCK)
    sums = torch.empty(widths, blocks, dtype=torch.int64, device=indices.device)
    _launch(kernels()[1].quotients, indices.numel(), indices, sums, indices.numel(), lowest, blocks, widths=widths)
    return sums


def rice_parameter(indices: Tensor, numel: int) -> tuple[int, int]:
    """The Rice parameter ``b`` with the fewest bits, by exact size, and the bits of the unary stream.

    All parameters are tried in one pass over the indices. The host waits once.

    Args:
        indices: shape ``(count,)``, ``count >= 1``, int64: ascending, distinct, each in ``[0, numel)``.
        numel: size of the vector that they index.
    """
    count = indices.numel()
    unary = (_quotients(indices, 0, MAX_PARAMETER + 1).sum(1) + count).tolist()
    b = min(range(len(unary)), key=lambda b: count * b + unary[b])
    return b, unary[b]


def rice_pack(indices: Tensor, b: int, numel: int, unary_bits: int | None = None) -> Tensor:
    """The remainder stream followed by the unary stream: uint8, as ``protocol.coding.rice`` writes them.

    Args:
        indices: as for ``rice_parameter``.
        b: at most ``MAX_PARAMETER``.
        numel: as for ``rice_parameter``.
        unary_bits: as from ``rice_parameter``; without it the host waits once, and room is made for the most.
    """
    count = indices.numel()
    split = -(-count * b // 8)
    bits = count + ((numel - count) >> b) if unary_bits is None else unary_bits
    words = torch.zeros(-(-(split + -(-bits // 8)) // 4), dtype=torch.int32, device=indices.device)
    sums = _quotients(indices, b, 1)[0]
    ends = sums.cumsum(0)
    _launch(kernels()[1].write_gaps, count, indices, sums, ends, words, count, b, 8 * split)
    if unary_bits is None:
        bits = count + int(ends[-1])
    return words.view(torch.uint8)[: split + -(-bits // 8)]


def rice_unpack(data: Tensor, b: int, count: int, numel: int) -> Tensor:
    """The ascending indices in a stream of ``rice_pack``: shape ``(count,)``, int64. The host waits once.

    Args:
        data: 1-D uint8, contiguous.
        b: the Rice parameter.
        count: how many indices there must be; at least 1.
        numel: what all of them must be below; less than ``2**61``.

    Raises:
        DecodeError: the stream does not hold exactly ``count`` ascending indices below ``numel``.
    """
    split = -(-count * b // 8)
    if b > MAX_PARAMETER:
        raise DecodeError(f"the index stream has Rice parameter {b}; valid is at most {MAX_PARAMETER}")
    if 8 * (data.numel() - split) < count:  # each index takes at least one bit of the unary stream
        raise DecodeError(f"the index stream of {data.numel()} bytes is too short for {count} indices")
    unary, used = data.numel() - split, count * b & 7
    ends, positions = _ones(data[split:], count)
    remainders = torch.empty_like(positions)
    _launch(kernels()[1].read_remainders, count, data, remainders, count, b, split)
    places = torch.arange(count, device=data.device)
    quotients = positions - places  # summed up to each index
    indices = (quotients << b) + remainders.cumsum(0) + places
    # an index is at most numel + 2**40 behind the one before it, so what wraps around was beyond the end earlier
    beyond = (quotients[-1] > numel >> b) | ((indices < 0) | (indices >= numel)).any()
    padding = data[split - 1] >> used if used else data.new_zeros(())
    found, last, outside, rest = torch.stack([ends[-1], positions[-1], beyond.long(), padding.long()]).tolist()
    rules = {
        "more indices than announced": found > count,
        "fewer indices than announced": found < count,
        "an index beyond the end of the segment": outside,
        "padding that is not empty": rest or 8 * unary - last > 8,
    }
    for rule, broken in rules.items():
        if broken:
            raise DecodeError(f"the index stream holds {rule}")
    return indices


def _ones(stream: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """How many bits are set up to the end of each block of a stream, and the places of the first ``room``."""
    blocks = -(-stream.numel() // (4 * WORDS))
    flags = torch.zeros(blocks * WORDS, dtype=torch.int32, device=stream.device)
    flags.view(torch.uint8)[: stream.numel()] = stream
    counts = torch.empty(blocks, dtype=torch.int64, device=stream.device)
    launch(kernels()[1].count_ones, blocks, flags, counts, words=WORDS, num_warps=4)
    ends = counts.cumsum(0)
    return ends, gather(flags, ends, None, room)[0]


def pack_digits(symbols: Tensor, base: int) -> Tensor:
    """As many base-``base`` digits as fit in a byte, the first symbol the lowest: uint8.

    Args:
        symbols: 1-D uint8, contiguous, each less than ``base``.
        base: from 2 to 256.
    """
    count, digits = symbols.numel(), per_byte(base)
    data = torch.empty(-(-count // digits), dtype=torch.uint8, device=symbols.device)
    _launch(kernels()[1].pack_digits, data.numel(), symbols, data, count, data.numel(), base=base, digits=digits)
    return data


def unpack_digits(data: Tensor, count: int, base: int) -> Tensor:
    """The first ``count`` symbols of ``pack_digits``: uint8. The host waits once where bytes can be invalid.

    Raises:
        DecodeError: the bytes are not what ``pack_digits`` writes for ``count`` symbols.
    """
    digits = per_byte(base)
    if data.numel() != -(-count // digits):
        raise DecodeError(f"{count} digits of base {base} take {-(-count // digits)} bytes, not {data.numel()}")
    symbols = torch.empty(count, dtype=torch.uint8, device=data.device)
    _launch(kernels()[1].unpack_digits, count, data, symbols, count, base=base, digits=digits)
    broken = []
    if base**digits < 256:
        broken.append((data >= base**digits).any())
    if count % digits:
        broken.append(data[-1] >= base ** (count % digits))
    if broken and bool(torch.stack(broken).any()):
        raise DecodeError(f"the segment's digits of base {base} are beyond the base, or behind the last symbol")
    return symbols


def lookup_add(out: Tensor, indices: Tensor | None, symbols: Tensor, table: Tensor) -> None:
    """``out[indices] += table[symbols]``: a value is taken first and added second.

    Args:
        out: 1-D float32 or float64, contiguous; altered.
        indices: int64, distinct, each in range, one for each symbol; None for all elements.
        symbols: 1-D uint8, contiguous; one beyond the table adds nothing.
        table: at most 256 values of the dtype of ``out``.
    """
    count = symbols.numel()
    places = symbols if indices is None else indices
    _launch(
        kernels()[1].lookup_add, count, out, places, symbols, table, count, table.numel(), sparse=indices is not None
    )
