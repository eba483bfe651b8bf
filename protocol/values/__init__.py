"""Value codes: how the values that were selected, or all of them, are written in few bits.

``casts`` narrow each number; ``grids``, ``signs`` and ``dither`` name each by a symbol. Ids are append-only.
"""

from __future__ import annotations

import torch

from protocol.values.casts import Cast
from protocol.values.code import Reader, SymbolCode
from protocol.values.dither import Dither, Natural
from protocol.values.grids import Geometric, Grid
from protocol.values.signs import Sign

__all__ = ["BY_ID", "BY_NAME", "F32", "F64", "Cast", "Dither", "Geometric", "SymbolCode", "ValueCode"]

ValueCode = Cast | SymbolCode

F64 = Cast("f64", 0, torch.float64)
F32 = Cast("f32", 1, torch.float32)
TERNARY = Dither("ternary", levels=1, largest=True)

CODES: tuple[ValueCode, ...] = (
    F64,
    F32,
    Cast("f16", 2, torch.float16),
    Cast("bf16", 3, torch.bfloat16),
    Sign(),
    Grid("int8", 7, 8, fine=16),
    Grid("int4", 8, 4),
    Grid("int2", 9, 2),
    TERNARY,
    Natural(),
)
RETIRED = (Geometric("int8", 5, 8), Geometric("int4", 6, 4))  # decoded for ever

BY_NAME = {code.name: code for code in CODES}
BY_ID: dict[int, Cast | Reader] = {code.wire_id: code for code in (*CODES, *RETIRED)}
if len(BY_ID) != len(CODES) + len(RETIRED) or max(BY_ID) >= 64:
    raise AssertionError("two value codes share a wire id, or one has no room for the flags beside it")
