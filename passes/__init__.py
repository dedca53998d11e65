"""Relax passes: each takes everything through its constructor and returns a new module."""

from __future__ import annotations

import tvm_ffi

from tvm_nm import errors

# An exception that crosses TVM's pass manager keeps its class only if TVM knows it by name.
for _name in errors.__all__:
    tvm_ffi.register_error(_name, getattr(errors, _name))
