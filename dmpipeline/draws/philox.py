# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="misc"
# code for numba's compiler, which checks the types itself

"""Philox 4x64-10, random bits by counter (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).

The words are those of ``numpy.random.Philox(key=key, counter=counter).random_raw``, drawn without the interpreter's
lock: threads that train models also draw them.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dmpipeline.compute import kernel

# table 2 of the paper: multipliers, and the steps by which keys change from round to round
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_ROUNDS = 10

_instruction: Any = intrinsic  # its calls have other arguments than its functions


@_instruction
def _product(_typing, a, b):
    """Multiply two words; return the high and the low one of the product."""

    def code(_context, builder, _signature, arguments):
        wide, word = ir.IntType(128), ir.IntType(64)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        high, low = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), word), builder.trunc(product, word)
        pair = builder.insert_value(ir.Constant(ir.ArrayType(word, 2), ir.Undefined), high, 0)
        return builder.insert_value(pair, low, 1)

    return types.UniTuple(types.uint64, 2)(a, b), code


@kernel
def fill(words, first_key, second_key, index):
    """Fill an array of uint64 with the words of a key, at the counters (1, 0, 0, index), (2, 0, 0, index), ...

    NumPy's generator begins like this when it is given the counter (0, 0, 0, index).
    """
    for start in range(0, len(words), 4):
        a, b, c, d = np.uint64(start // 4 + 1), np.uint64(0), np.uint64(0), index
        key, other_key = first_key, second_key
        for _ in range(_ROUNDS):
            high, low = _product(_MULTIPLIERS[0], a)
            other_high, other_low = _product(_MULTIPLIERS[1], c)
            a, b, c, d = other_high ^ b ^ key, other_low, high ^ d ^ other_key, low
            key += _KEY_STEPS[0]
            other_key += _KEY_STEPS[1]
        words[start] = a
        if start + 1 < len(words):
            words[start + 1] = b
        if start + 2 < len(words):
            words[start + 2] = c
        if start + 3 < len(words):
            words[start + 3] = d
