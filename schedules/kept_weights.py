"""Weights that a library expands when it is first called, and keeps.

What a kernel reads may be several times as large as what it is made from. `expands_weights` makes a function take the
small form: on the first call it expands it into *room* within the library's own memory, zeros that take no bytes in
the file (``.bss``); later calls find it there. A flag at the head of the room tells whether it is filled. Threads that
come at the same time may both fill it, with the same values.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

__all__ = ["EXPANDS", "ROOM", "WEIGHT", "expands_weights", "room_bytes", "room_code"]

EXPANDS = "tvm_nm.expands"
"""PrimFunc attribute of a function of two arguments that only expands the first, weights, into the second."""

ROOM = "room"
"""Name of the argument that says where a function's room is: bytes from the beginning of the library's memory."""

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector
WEIGHT = "weight"
"""Name of the argument that is expanded."""

_ROOM_OF, _IS_FILLED, _SET_FILLED = "tvm_nm_room", "tvm_nm_room_is_filled", "tvm_nm_set_room_filled"
# Default visibility: the memory is then reached by way of an address table, however large it is. The fence keeps reads
# of the weights behind the flag, even those that LLVM takes for reads of something else.
_CODE = """
@tvm_nm_rooms = linkonce_odr global [{size} x i8] zeroinitializer, align {alignment}
define linkonce_odr hidden ptr @{room}(i64 %offset) alwaysinline nounwind willreturn {{
  %address = getelementptr i8, ptr @tvm_nm_rooms, i64 %offset
  ret ptr %address
}}
define linkonce_odr hidden i32 @{is_filled}(i64 %offset) alwaysinline nounwind willreturn {{
  %flag = getelementptr i8, ptr @tvm_nm_rooms, i64 %offset
  %value = load atomic i32, ptr %flag acquire, align {alignment}
  ret i32 %value
}}
define linkonce_odr hidden i32 @{set_filled}(i64 %offset) alwaysinline nounwind willreturn {{
  %flag = getelementptr i8, ptr @tvm_nm_rooms, i64 %offset
  store atomic i32 1, ptr %flag release, align {alignment}
  fence seq_cst
  ret i32 0
}}
"""


def room_bytes(shape: tuple[int, ...]) -> int:
    """Return how much memory float32 weights of a shape take, with their flag."""
    return _ALIGNMENT + -(-4 * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


def room_code(size: int) -> str:
    """Return LLVM code that defines the memory of a library, so many bytes, and the functions that look for rooms."""
    names = {"room": _ROOM_OF, "is_filled": _IS_FILLED, "set_filled": _SET_FILLED}
    return _CODE.format(size=size, alignment=_ALIGNMENT, **names)


def expands_weights(func: tvm.tirx.PrimFunc, expansion: tvm.tirx.PrimFunc, code: str) -> tvm.tirx.PrimFunc:
    """Return a scheduled function that takes its weights as an expansion takes them.

    Parameters
    ----------
    func
        A function with an argument `weight`.
    expansion
        The function that makes it, of the attribute `EXPANDS`.
    code
        See `room_code`.

    Returns
    -------
    The function. Its argument `weight` has the shape of the expansion's argument, and `ROOM`, an int64, follows it.
    """
    at = [param.name for param in func.params].index(WEIGHT)
    weight = func.params[at]
    small, filled = expansion.params
    room = tirx.Var(ROOM, "int64")
    float_pointer = tvm.ir.PointerType(tvm.ir.PrimType("float32"))
    address = tirx.Var("weight_address", float_pointer)
    found = tirx.call_extern(float_pointer, _ROOM_OF, room + tirx.const(_ALIGNMENT, "int64"))
    filling = tvm_ffi.structural_map(_body(expansion), (tirx.Var, lambda v: weight if v.same_as(filled) else v))
    fill = tirx.SeqStmt([filling, tirx.Evaluate(tirx.call_extern("int32", _SET_FILLED, room))])
    is_empty = tirx.call_extern("int32", _IS_FILLED, room) == 0
    body = tirx.SeqStmt(
        [
            tirx.Bind(address, found),
            tirx.DeclBuffer(weight, data=address),
            tirx.IfThenElse(is_empty, fill, None),
            _body(func),
        ]
    )
    body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(code), body)
    params = [*func.params[:at], small, room, *func.params[at + 1 :]]
    return tirx.PrimFunc(params, _with_root(func.body, body), func.ret_type, func.attrs)


def _body(func: tvm.tirx.PrimFunc) -> Any:
    return func.body.block.body


def _with_root(realize: Any, body: Any) -> Any:
    """Return a function's outermost block around another body."""
    block = realize.block
    new = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        body,
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )
    return s_tir.SBlockRealize(realize.iter_values, realize.predicate, new)
