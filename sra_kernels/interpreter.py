"""The Triton kernels on a machine without a GPU, in Triton's own interpreter: for tests, not speed.

The interpreter keeps a bfloat16 as its bits. It truncates where hardware rounds to nearest even,
and multiplies the bits of the operands of `tl.dot`. Both are put right here.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

VARIABLE = "TRITON_INTERPRET"


def problem() -> str:
    """Why the interpreter cannot run in this process; "" if it can."""
    if "triton" not in sys.modules:
        os.environ[VARIABLE] = "1"  # read by Triton when it is imported
    try:
        from sra_kernels.tuning import interpreted

        if not interpreted():
            return f"Triton was imported before: set {VARIABLE}=1 before Python starts"
    except ImportError:
        return "Triton is not installed: pip install triton"
    install()
    return ""


@functools.cache
def install() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(bits: Any) -> Any:
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).reshape(
            np.shape(bits)
        )

    def narrowed(bits: Any) -> Any:
        bits = np.ascontiguousarray(bits).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, np.uint16(0x7FC0), rounded)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data)
        toward_zero = interpreter._ir.ROUNDING_MODE.RTZ
        if (source, target) == (tl.float32, tl.bfloat16) and rounding != toward_zero:
            return narrowed(data).reshape(np.shape(data))
        return convert(data, source, target, rounding)

    def operand(x: Any) -> Any:
        if getattr(x.dtype, "scalar", x.dtype) != tl.bfloat16:
            return x
        return interpreter.TensorHandle(widened(x.data).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, operand(a), operand(b), *rest)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
