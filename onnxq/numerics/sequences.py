"""Numbers that are spread evenly, the same in every run."""

from __future__ import annotations


def weyl(index: int) -> int:
    """Where to begin in the index-th sample, from 0 to 2^31: a Weyl sequence.

    The step is 2^32 by the golden ratio (Knuth, "The Art of Computer Programming", section 6.4).
    """
    return index * 2654435769 % (1 << 31)
