"""Prefetch instructions for marked loops of scheduled functions.

LLVM's prefetch intrinsic counts as an access to memory that may be anywhere, and would keep the sums of a loop in
memory. The instructions are therefore assembly that touches nothing that LLVM can see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from tvm_nm.schedules.machine import architecture_of

__all__ = ["FETCHES", "Fetch", "fetch", "fetch_code", "fetching_loop", "substitute", "unmarked_loop", "with_fetches"]

FETCHES = "tvm_nm_fetches"
"""Annotation of a loop that contains fetches already, written with the code."""


class Fetch(Enum):
    """What a line is fetched for; the value is the name of the function that does it."""

    AHEAD = "tvm_nm_prefetch"  # to be read later: into L2
    READ = "tvm_nm_fetch"
    WRITE = "tvm_nm_fetch_to_write"


_INSTRUCTIONS = (
    (
        re.compile(r"x86_64h?|amd64|i[3-6]86"),
        {Fetch.AHEAD: "prefetcht1 ($0)", Fetch.READ: "prefetcht0 ($0)", Fetch.WRITE: "prefetchw ($0)"},
    ),
    (
        re.compile(r"aarch64|arm64e?"),
        {Fetch.AHEAD: "prfm pldl2keep, [$0]", Fetch.READ: "prfm pldl1keep, [$0]", Fetch.WRITE: "prfm pstl1keep, [$0]"},
    ),
)
_FUNCTION = """
define linkonce_odr i32 @{name}(ptr %address) alwaysinline nounwind willreturn {{
  call void asm sideeffect "{instruction}", "r"(ptr %address) memory(inaccessiblemem: readwrite) nounwind willreturn
  ret i32 0
}}
"""


def fetch_code(target: tvm.target.Target) -> str | None:
    """Return LLVM code that defines the functions of `Fetch`; None where the target has no known instructions."""
    architecture = architecture_of(target)
    for names, instructions in _INSTRUCTIONS:
        if names.fullmatch(architecture):
            return "".join(_FUNCTION.format(name=kind.value, instruction=text) for kind, text in instructions.items())
    return None


def fetch(kind: Fetch, buffer: Any, indices: Sequence[Any]) -> Any:
    """Return a statement that fetches the line of an element, which need not exist."""
    return tirx.Evaluate(tirx.call_extern("int32", kind.value, tirx.address_of(tirx.BufferLoad(buffer, list(indices)))))


def fetching_loop(loop: Any, annotation: str, fetches: Sequence[Any], code: str) -> Any:
    """Return a loop without an annotation of it, each of whose iterations begins with some fetches."""
    body = tirx.SeqStmt([*fetches, loop.body]) if fetches else loop.body
    body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(code), body)
    return unmarked_loop(loop, annotation, body)


def with_fetches(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Return a function whose loops marked with `FETCHES` fetch, or do not where the target has no instruction."""
    code = fetch_code(target)
    names = {kind.value for kind in Fetch}

    def is_fetch(stmt: Any) -> bool:
        arguments: Sequence[Any] = getattr(stmt.value, "args", ())
        return len(arguments) == 2 and getattr(arguments[0], "value", None) in names

    def visit(loop: Any) -> Any:
        if FETCHES not in loop.annotations:
            return loop
        if code is not None:
            return fetching_loop(loop, FETCHES, [], code)
        nothing = tirx.Evaluate(tirx.const(0, "int32"))
        body = tvm_ffi.structural_map(loop.body, (tirx.Evaluate, lambda stmt: nothing if is_fetch(stmt) else stmt))
        return unmarked_loop(loop, FETCHES, body)

    body = tvm_ffi.structural_map(func.body, (tirx.For, visit))
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def unmarked_loop(loop: Any, annotation: str, body: Any) -> Any:
    """Return a loop without an annotation of it, around another body."""
    rest = {key: value for key, value in loop.annotations.items() if key != annotation}
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, rest)


def substitute(exprs: Sequence[Any], values: Mapping[Any, Any]) -> list[Any]:
    """Return expressions with variables replaced."""
    return [tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var))) for expr in exprs]
