"""A C header for a model's inputs and outputs: shapes, scales, and functions between the two.

C99 without a library beyond stdint.h. For each input and output, with a prefix made of the model's
file and the tensor's name: macros NAME, RANK, SHAPE (an initializer; -1 for free axes), SIZE
(elements, where no axis is free); and for integers that stand for floats also TYPE, SCALE,
ZERO_POINT, a function that quantizes a float as ONNX does, and one that dequantizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from onnxq.ports import Affine, Terminal
from onnxq.schemes import FORMATS

ROUND = """\
/* Round half to even, as QuantizeLinear does. */
static inline int32_t {stem}_round(float v)
{{
    int32_t q = (int32_t)v;
    float rest = v - (float)q;

    if (rest > 0.5f || (rest == 0.5f && q % 2 != 0)) {{
        return q + 1;
    }}
    if (rest < -0.5f || (rest == -0.5f && q % 2 != 0)) {{
        return q - 1;
    }}
    return q;
}}"""
CONVERSIONS = """\
static inline {type}_t {name}_quantize(float x)
{{
    float v = x / {upper}_SCALE;

    if (v >= {greatest}.0f) {{
        return ({type}_t){qmax};
    }}
    if (!(v > {least}.0f)) {{
        return ({type}_t)({qmin});
    }}
    return ({type}_t)({stem}_round(v) + {upper}_ZERO_POINT);
}}

static inline float {name}_dequantize({type}_t q)
{{
    return (float)((int32_t)q - {upper}_ZERO_POINT) * {upper}_SCALE;
}}"""


def c_header(terminals: Iterable[Terminal], model: str) -> str:
    """The header for a model of that file name."""
    stem = _identifier(PurePath(model).stem)
    guard = f"{stem.upper()}_IO_H"
    parts = [f"/* Inputs and outputs of {_comment(model)}, written by onnxq. */"]
    parts += [f"#ifndef {guard}\n#define {guard}\n\n#include <stdint.h>"]
    parts += [ROUND.format(stem=stem)]
    taken = set[str]()
    for terminal in terminals:
        name = _unique(f"{stem}_{_identifier(terminal.name)}", taken)
        parts.append("\n".join(_macros(terminal, name.upper())))
        if terminal.affine is not None:
            parts.append(_conversions(terminal.affine, stem, name))
    return "\n\n".join([*parts, f"#endif /* {guard} */"]) + "\n"


def _macros(terminal: Terminal, upper: str) -> Iterator[str]:
    shape, affine = terminal.shape, terminal.affine
    known = "of any shape" if shape is None else str([d if d is not None else "?" for d in shape])
    yield f"/* {terminal.role} {_comment(terminal.name)}: {terminal.type} {_comment(known)} */"
    yield f"#define {upper}_NAME {_text(terminal.name)}"
    if shape is not None:
        sizes = [d if isinstance(d, int) and d >= 0 else -1 for d in shape]
        yield f"#define {upper}_RANK {len(sizes)}"
        if sizes:
            yield f"#define {upper}_SHAPE {{{', '.join(map(str, sizes))}}}"
        if -1 not in sizes:
            yield f"#define {upper}_SIZE {math.prod(sizes)}"
    if affine is not None:
        yield f"#define {upper}_TYPE {affine.type}_t"
        yield f"#define {upper}_SCALE {_float(affine.scale)}"
        yield f"#define {upper}_ZERO_POINT ({affine.zero_point})"


def _conversions(affine: Affine, stem: str, name: str) -> str:
    """Quantize, which saturates and makes the least integer of NaN, and dequantize."""
    numbers = FORMATS[affine.type]
    return CONVERSIONS.format(
        type=affine.type, stem=stem, name=name, upper=name.upper(),
        qmin=numbers.qmin, qmax=numbers.qmax,
        least=int(numbers.qmin) - affine.zero_point,
        greatest=int(numbers.qmax) - affine.zero_point,
    )  # fmt: skip


def _float(value: float) -> str:
    """A float32 in as many digits as tell it from all others."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _identifier(name: str) -> str:
    """A C identifier of ASCII letters, digits and single underscores."""
    plain = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_") or "tensor"
    return f"n{plain}" if plain[0].isdigit() else plain


def _unique(name: str, taken: set[str]) -> str:
    """A name that no other has, in capitals either."""
    candidate, number = name, 1
    while candidate.upper() in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate.upper())
    return candidate


def _comment(text: str) -> str:
    """Text that cannot end a comment, begin one, or go on in the next line."""
    plain = text.encode("ascii", "backslashreplace").decode()
    plain = "".join(c if c.isprintable() else "?" for c in plain)
    return plain.replace("\\", "|").replace("*/", "* /").replace("/*", "/ *")


def _text(text: str) -> str:
    """A C string literal of the name's bytes in UTF-8."""

    def plain(byte: int) -> bool:
        return 32 <= byte < 127 and chr(byte) not in '"\\?'

    return '"' + "".join(chr(b) if plain(b) else f"\\{b:03o}" for b in text.encode()) + '"'
