"""Minimum cut against every possible cut."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.mincut import INFINITE, Network

PLACES = ["s", "t", "a", "b", "c", "d"]
EDGES = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES), st.sampled_from([0, 1, 2, 3.5, 9])),
    max_size=24,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(EDGES)
def test_no_cut_is_cheaper(edges: list[tuple[str, str, float]]) -> None:
    network = Network()
    for a, b, capacity in edges:
        network.add(a, b, capacity)

    def cost(side: set[str]) -> float:
        return sum(capacity for a, b, capacity in edges if a in side and b not in side)

    found = {str(place) for place in network.cut("s", "t")}
    others = product([False, True], repeat=4)
    best = min(
        cost({"s"} | {p for p, is_in in zip("abcd", bits, strict=True) if is_in}) for bits in others
    )
    assert cost(found | {"s"}) == pytest.approx(best)


def test_tied_ends_are_an_error() -> None:
    network = Network()
    network.add("s", "a", INFINITE)
    network.add("a", "t", INFINITE)
    with pytest.raises(ValueError, match="tied together"):
        network.cut("s", "t")
