"""The cut of a scope against a model that goes page by page, as the patch did."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ksmd.core.scope import Scope, within
from ksmd.core.tables import Members

PAGE = 4096
ZERO = 0

pages = st.dictionaries(
    st.tuples(st.integers(1, 3), st.integers(0, 12)), st.integers(0, 6), max_size=30
)


@given(
    pages,
    st.sets(st.integers(0, 6)),
    st.one_of(st.none(), st.dictionaries(st.integers(1, 4), st.tuples(*[st.integers(0, 13)] * 2))),
    st.integers(0, 20),
)
def test_a_cut_holds_its_limit_and_takes_only_what_it_may(contents, store, spans, limit):
    order = sorted(contents)
    members = Members(
        np.array([slot for slot, _ in order], np.uint32),
        np.array([page for _, page in order], np.uint64),
        np.array([contents[key] for key in order], np.uint32),
    )
    ranges = None
    if spans is not None:
        ranges = {
            slot: [(low * PAGE, high * PAGE)] if low < high else []
            for slot, (low, high) in spans.items()
        }
    checksums = np.array(sorted(store), np.uint32)
    kept = within(members, Scope(ranges, limit), checksums, ZERO)
    found = set(zip(kept.slots.tolist(), kept.pages.tolist(), strict=True))

    def covered(key) -> bool:
        if ranges is None:
            return True
        low, high = spans.get(key[0], (0, 0))
        return low <= key[1] < high

    assert found <= set(order)
    assert sorted(found) == list(zip(kept.slots.tolist(), kept.pages.tolist(), strict=True))
    # what a merge of just these would count, page by page
    holders = Counter(contents[key] for key in found)
    outside = {contents[key] for key in order if not covered(key)}
    counted = 0
    for content in holders:
        mine = sum(1 for key in found if covered(key) and contents[key] == content)
        joins = content == ZERO or content in store or content in outside
        counted += mine if joins else max(0, mine - 1)
        assert mine or not holders[content], "partners come with a covered page only"
    assert counted <= limit
    # nothing is left out without need: all of it when there is room for all
    if limit == 20 and len(order) <= 20:
        wanted = {contents[key] for key in order if covered(key)}
        everything = {key for key in order if covered(key) or contents[key] in wanted}
        assert found == everything
