# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="misc,no-any-return"
# ruff: noqa: ARG001
# code for numba's compiler, which checks the types itself

"""A cache line of sixteen float32 numbers as one value in compiled kernels.

A kernel that is written in lines says itself what is held in registers and what is fused, where a loop over numbers
leaves it to the compiler to see. LLVM splits a line into whatever the processor has: two registers of AVX2, one of
AVX-512, four of Neon. Each function here is one instruction or two. Arrays are float32 and contiguous, their index
counts numbers in flat order and is not checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LINE = 16
"""float32 numbers in a cache line."""

_instruction: Any = intrinsic  # its calls have other arguments than its functions

_LINE = ir.VectorType(ir.FloatType(), LINE)
_UNKNOWN = ir.Constant(_LINE, ir.Undefined)


class Line(types.Type):
    """Numba's type of a line."""

    def __init__(self) -> None:
        super().__init__(name="Line")


@register_model(Line)
class _LineModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _LINE)


_line = Line()


@_instruction
def load(_typing, array, index):
    """Read the line that begins at an index."""

    def code(context, builder, signature, arguments):
        line = builder.load(builder.bitcast(_place(context, builder, signature, arguments), _LINE.as_pointer()))
        line.align = 4
        return line

    return _line(array, types.intp), code


@_instruction
def store(_typing, array, index, line):
    """Write a line where it is to begin."""

    def code(context, builder, signature, arguments):
        place = builder.bitcast(_place(context, builder, signature, arguments), _LINE.as_pointer())
        builder.store(arguments[2], place).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, line), code


@_instruction
def store_bytes(_typing, array, index, line):
    """Write a line of small whole numbers into an array of int8."""

    def code(context, builder, signature, arguments):
        numbers = ir.VectorType(ir.IntType(8), LINE)
        place = builder.bitcast(_place(context, builder, signature, arguments), numbers.as_pointer())
        builder.store(builder.fptosi(arguments[2], numbers), place).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, line), code


@_instruction
def spread(_typing, array, index):
    """Read one number into every place of a line."""

    def code(context, builder, signature, arguments):
        return _spread(builder, builder.load(_place(context, builder, signature, arguments)))

    return _line(array, types.intp), code


@_instruction
def constant(_typing, number):
    """Put one number into every place of a line."""

    def code(_context, builder, _signature, arguments):
        return _spread(builder, arguments[0])

    return _line(types.float32), code


@_instruction
def multiply_add(_typing, a, b, c):
    """Compute a * b + c, rounded once where the processor can."""

    def code(_context, builder, _signature, arguments):
        form = ir.FunctionType(_LINE, [_LINE] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, form, "llvm.fmuladd.v16f32"), arguments)

    return _line(a, b, c), code


@_instruction
def where_larger(_typing, a, b, x, y):
    """Choose, number by number, that of x where a > b, else that of y."""

    def code(_context, builder, _signature, arguments):
        a, b, x, y = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), x, y)

    return _line(a, b, x, y), code


def _place(context, builder, signature, arguments):
    array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=arguments[0])
    return builder.gep(array.data, [arguments[1]])


def _spread(builder, number):
    first = builder.insert_element(_UNKNOWN, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, _UNKNOWN, ir.Constant(ir.VectorType(ir.IntType(32), LINE), [0] * LINE))
