"""Which of 64 magnitudes reach a threshold, in the vector instructions of the machine.

Written in LLVM's portable terms: LLVM turns them into what there is (AVX-512, AVX2, NEON) or into plain
loops; the results are the same everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from protocol.kernels.words import intrinsic

LANES = 64  # values that `reaching` looks at in one call


@intrinsic
def reaching(typing: Any, values: Any, start: Any, threshold: Any) -> Any:
    """``uint64`` whose bit i says that ``|values[start + i]| >= threshold``, for i below 64.

    ``threshold`` has the dtype of ``values`` and is not negative. Magnitudes are compared as integers,
    in which order NaN stands above infinity. ``start + 64`` must not exceed the size.
    """

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width = signature.args[0].dtype.bitwidth
        lane = ir.IntType(width)
        vector = ir.VectorType(lane, LANES)
        unknown = ir.Constant(vector, ir.Undefined)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        address = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        without_sign = ir.Constant(vector, [(1 << (width - 1)) - 1] * LANES)
        magnitudes = builder.and_(builder.load(address, align=width // 8), without_sign)
        first = builder.insert_element(unknown, builder.bitcast(args[2], lane), ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        flags = builder.icmp_signed(">=", magnitudes, builder.shuffle_vector(first, unknown, everywhere))
        return builder.bitcast(flags, ir.IntType(LANES))

    return types.uint64(values, types.intp, values.dtype), lower
