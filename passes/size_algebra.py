"""Sizes as numbers, symbols and products of them: the arithmetic of shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

Size = int | str
Shape = list[Size]
Known = list[Size | None]  # sizes or elements of an integer tensor; None: nothing known of it


def product(sizes: Iterable[Size]) -> Size:
    """A number, or one symbol for the product of sizes whatever their order."""
    number, symbols = _factors(sizes)
    return _joined(number, symbols)


def quotient(above: Iterable[Size], below: Iterable[Size]) -> Size | None:
    """The product of some sizes over that of others; None when that is no product of sizes."""
    number, symbols = _factors(above)
    divisor, gone = _factors(below)
    if divisor == 0 or number % divisor or gone - symbols:
        return None
    return _joined(number // divisor, symbols - gone)


def _factors(sizes: Iterable[Size]) -> tuple[int, Counter[str]]:
    number, symbols = 1, Counter[str]()
    for size in sizes:
        for factor in size.split("*") if isinstance(size, str) else [size]:
            if isinstance(factor, str) and not factor.startswith("#"):
                symbols[factor] += 1
            else:
                number *= int(str(factor).removeprefix("#"))
    return number, symbols


def _joined(number: int, symbols: Counter[str]) -> Size:
    if not symbols or number == 0:
        return number
    return "*".join([*([f"#{number}"] if number != 1 else []), *sorted(symbols.elements())])


def parted(size: Size) -> tuple[int, str]:
    """A size as a number times a symbol; the empty one for 1."""
    number, symbols = _factors([size])
    return number, "*".join(sorted(symbols.elements()))


def symbol(name: str) -> Size:
    """The symbol for a free axis that the model has a name for."""
    return "=" + name.replace("*", ".")


def broadcast(shapes: Sequence[Shape | None]) -> Known | None:
    """The common shape of operands, by ONNX's (numpy's) rules; None when a rank is not known."""
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes):
        return None
    rank = max(map(len, known))
    result: Known = []
    for axis in range(-rank, 0):
        dims = {s[axis] for s in known if len(s) >= -axis} - {1}
        numbers = {d for d in dims if isinstance(d, int)}
        if numbers or not dims:
            result.append(next(iter(numbers), 1))
        else:
            result.append(_common([d for d in dims if isinstance(d, str)]))
    return result


def _common(symbols: list[str]) -> Size | None:
    """What sizes that are no numbers broadcast to."""
    wide = [s for s in symbols if all(o == s or o.startswith(_cut(s)) for o in symbols)]
    return wide[0] if wide else None


def cut(size: Size, most: Size) -> Size | None:
    """The size of an axis of `most` elements cut to its first `size`: the smaller number.

    It broadcasts with `size` to `size`: the two are the same, where that is possible at all.
    """
    if isinstance(size, int):
        return min(size, most) if isinstance(most, int) and size >= 0 else None
    return f"{_cut(size)}{most})".replace("*", ".") if size != most else size


def _cut(symbol: str) -> str:
    return f"min({symbol.replace('*', '.')},"


def target_of(source: Shape, result: Sequence[Size | None]) -> list[int] | None:
    """The constant target of a Reshape from one shape to another; None when there is none.

    A number stays, a free axis is 0 (as it was) where it has the same index in both, and one
    further axis is -1 (whatever is left). Sizes of zero cannot be written that way.
    """
    target: list[int] = []
    for i, size in enumerate(result):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and i < len(source) and source[i] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) < 2 and 0 not in result else None


def is_static(shape: Sequence[Size | None] | None) -> bool:
    """Whether all sizes are numbers."""
    return shape is not None and all(isinstance(d, int) for d in shape)
