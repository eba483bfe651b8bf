"""How many bytes a message takes, and how many it would if nothing were wasted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from deploy.bench.contenders import Square
from protocol import compressor
from protocol.coding import indices as index_codes
from protocol.kernels.product import Product
from protocol.messages import Push
from protocol.segment import ALL, CODED, KEYED, NOTHING, PRODUCT, unpack
from protocol.update import Update
from protocol.values.decoded import Narrowed, Symbols

CODE_NAMES = {**index_codes.NAMES, ALL: "all", NOTHING: "nothing", KEYED: "keyed", PRODUCT: "product"}


@dataclass(frozen=True)
class Size:
    """Of one message with one body. Bits are for a value sent, if nothing else is said."""

    spec: str
    numel: int
    sent: int  # values
    body_bytes: int
    frame_bytes: int
    ratio: float  # bytes of the elements in float32 to bytes of the frame
    bits_an_element: float  # of the frame
    bits_a_value: float  # of the frame
    index_code: str
    index_bits: float  # as they travel
    selection_bits: float  # log2 of the number of selections of that size
    value_bits: float  # log2 of the number of symbols, or their entropy where they are entropy-coded
    to_ideal: float  # bits of the frame to those of selection and values


def measure(vector: Tensor, spec: str) -> Size:
    """The size of ``vector`` in a compressor's message; as many elements as make a square, if it wants a matrix."""
    square = Square.of(vector.numel())
    is_matrix = spec.startswith("lowrank")
    numel = square.numel if is_matrix else vector.numel()
    c = compressor(spec, (square.rows, square.columns) if is_matrix else ())
    body = c.encode(vector[:numel], c.init(numel), 1)[0]
    frame = Push(1, 1, 1, samples=64, bodies=(body,)).pack()
    update, code = unpack(body, numel), int(body[0])
    sent, value_bits = _values(update, entropy_coded=bool(body[1] & CODED))
    index_bits = selection_bits = 0.0
    if code in index_codes.NAMES and update.indices is not None:
        index_bits = 8 * index_codes.encode(update.indices, numel)[2].size / sent
        selection_bits = log2_selections(numel, sent) / sent
    elif code == KEYED:
        index_bits = 64 / sent
    return Size(
        spec=spec,
        numel=numel,
        sent=sent,
        body_bytes=body.size,
        frame_bytes=frame.size,
        ratio=4 * numel / frame.size,
        bits_an_element=8 * frame.size / numel,
        bits_a_value=8 * frame.size / sent,
        index_code=CODE_NAMES[code],
        index_bits=index_bits,
        selection_bits=selection_bits,
        value_bits=value_bits,
        to_ideal=8 * frame.size / (sent * (selection_bits + value_bits)),
    )


def log2_selections(numel: int, count: int) -> float:
    """``log2 C(numel, count)``: bits that name one selection of so many, all being as likely."""
    parts = math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)
    return parts / math.log(2)


def _values(update: Update, entropy_coded: bool) -> tuple[int, float]:
    """How many values travel, and the bits of each."""
    coded = update.coded
    if isinstance(coded, Product):
        return coded.left.size + coded.right.size, 8.0 * coded.dtype.itemsize
    if isinstance(coded, Symbols):
        return len(coded), _entropy(coded.symbols) if entropy_coded else math.log2(coded.numbers.table.size)
    return len(coded), _narrowed(coded, entropy_coded)


def _narrowed(coded: Narrowed, entropy_coded: bool) -> float:
    size = coded.code.dtype.itemsize
    return sum(_entropy(plane) for plane in coded.data.reshape(-1, size).T) if entropy_coded else 8.0 * size


def _entropy(symbols: npt.NDArray[Any]) -> float:
    """Bits a symbol, if each is as likely as it is frequent."""
    counts = np.bincount(symbols)
    chances = counts[counts > 0] / symbols.size
    return float(-(chances * np.log2(chances)).sum())
