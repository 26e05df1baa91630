"""Whatever a settings file holds: it is read, or refused in words with places."""

import string

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ksmd.settings import (
    Match,
    Region,
    Settings,
    SettingsError,
    Target,
    changed,
    dump,
    effective,
    loads,
)
from ksmd.settings.conflicts import conflicts

WORDS = st.sampled_from(
    "version run on_stop socket scan tables window store limits targets name match regions domain"
    " pid exe comm cmdline user cgroup unit start npages anon heap pages_to_scan stop yes on 1 0"
    " -1 0x1000 017 1:30 1.5 .nan 1e3 2001-01-01 ~ << = *a &a !!str !x | > ' \" # - ? : , [ ] { }"
    " %YAML --- ... \\0 \\ud800".split()
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | WORDS
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=25,
)
SECTIONS = st.dictionaries(WORDS, SCALARS, max_size=4)
TARGETS = st.fixed_dictionaries(
    {},
    optional={
        "name": SCALARS,
        "match": st.dictionaries(WORDS, SCALARS | st.lists(SCALARS, max_size=3), max_size=3),
        "regions": SCALARS | st.lists(SECTIONS | SCALARS, max_size=3),
        "domain": SCALARS,
    },
)
NEARLY = st.fixed_dictionaries(
    {"version": st.just(1) | SCALARS},
    optional={
        "run": SCALARS,
        "socket": SCALARS,
        "scan": SECTIONS,
        "targets": st.lists(TARGETS | SCALARS, max_size=3),
    },
)


def judge(text: str) -> None:
    """Read *text*; a mistake must carry a place inside the text and be printable."""
    try:
        read = loads(text, "f")
    except SettingsError as error:
        problems = error.problems
    else:
        assert loads(dump(read)) == read
        return
    assert problems
    lines = len(text.splitlines()) + 2
    for problem in problems:
        assert 0 <= problem.line <= lines
        assert problem.message
        assert "\n" not in str(problem)
        str(problem).encode()
    places = [(problem.line, problem.column) for problem in problems]
    assert places == sorted(places)


@settings(max_examples=200)
@given(st.text())
@example("\x85")
@example("\ufeff")
@example('"\\U00110000"')
@example("%YAML 1." + "9" * 5000)
@example("&a [*a, *a]")
def test_any_text_is_read_or_refused(text):
    judge(text)


@settings(max_examples=300)
@given(st.lists(WORDS | st.sampled_from([" ", "\n", "\n  ", ": ", "- ", ", "]), max_size=40))
def test_any_pile_of_yaml_tokens_is_read_or_refused(tokens):
    judge("".join(tokens))


@settings(max_examples=200)
@given(TREES | NEARLY)
def test_any_yaml_document_is_read_or_refused(content):
    judge(yaml.dump(content))


@settings(max_examples=200)
@given(NEARLY, st.data())
def test_a_damaged_document_is_read_or_refused(content, data):
    text = yaml.safe_dump(content)
    at = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 6))
    judge(text[:at] + data.draw(st.text(max_size=4)) + text[at + length :])


NAMES = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=12)
# what YAML, a path and a log line can carry: no NUL, no half of a surrogate pair
TEXTS = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=12
)
COUNTS = st.integers(1, 2**32 - 1)
SIZES = st.integers(0, 2**32 - 1)
REGEXES = st.sampled_from(["worker", "^a b$", r"\d+(x|y)", "[a-z]*", "true", "a: #b", "'\"\n\t"])


@st.composite
def ranges(draw):
    """Draw regions that do not overlap, in any order."""
    gaps = draw(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), min_size=1, max_size=5))
    regions, page = [], 0
    for gap, npages in gaps:
        regions.append(Region(start=(page + gap) << 12, npages=npages))
        page += gap + npages
    return tuple(draw(st.permutations(regions)))


@st.composite
def targets(draw):
    """Draw targets with different names and different pids."""
    names = draw(st.lists(NAMES, unique=True, max_size=4))
    return tuple(
        Target(
            name=name,
            match=Match(
                pid=draw(st.just((at + 1,)) | st.just((at + 1, at + 100))),
                cmdline=draw(st.none() | REGEXES),
                **{
                    key: draw(st.none() | TEXTS)
                    for key in ("exe", "comm", "user", "cgroup", "unit")
                },
            ),
            regions=draw(st.sampled_from(["anon", "heap"]) | ranges()),
            domain=draw(st.none() | NAMES),
            accept_seccomp_risk=draw(st.booleans()),
            min_age_secs=draw(st.integers(0, 10**6)),
        )
        for at, name in enumerate(names)
    )


VALID = st.builds(
    Settings,
    version=st.just(1),
    run=st.sampled_from(["stop", "merge", "unmerge"]),
    on_stop=st.sampled_from(["unmerge", "keep"]),
    socket=st.sampled_from(["/run/ksmd/ksmd.sock", "/tmp/a b", "/yes", "/é#: x"]),
    scan=st.fixed_dictionaries(
        {},
        optional={
            "pages_to_scan": COUNTS,
            "sleep_millisecs": st.integers(0, 3_600_000),
            "max_pages_to_merge": COUNTS,
        },
    ),
    tables=st.fixed_dictionaries(
        {}, optional={"page_hash_size": SIZES, "rmap_hash_size": SIZES, "sha1_hash_size": SIZES}
    ),
    targets=targets(),
)


@settings(max_examples=200)
@given(VALID)
def test_valid_settings_read_back_as_they_were_dumped(valid):
    read = loads(dump(valid))
    assert read == valid
    assert changed(effective(valid), effective(read)) == []


@settings(max_examples=100)
@given(VALID, VALID)
def test_differences_are_told_exactly_when_there_are_some(old, new):
    assert (changed(effective(old), effective(new)) == []) == (old == new)


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), max_size=5)


def share_a_page(one, other) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


@settings(max_examples=500)
@given(st.lists(SPANS, max_size=3))
@example([[(0, 2)], [(1, 1)], [(0, 3)]])  # the last hides the first from the second
def test_conflicts_are_found_exactly_where_pages_are_claimed_twice(claimed):
    found = conflicts(
        [
            {
                "match": {"pid": 7},
                "regions": [{"start": start << 12, "npages": npages} for start, npages in spans],
            }
            for spans in claimed
        ]
    )
    spans = [(t, r, span) for t, spans in enumerate(claimed) for r, span in enumerate(spans)]
    within = {
        ("targets", t, "regions", r)
        for t, r, a in spans
        for u, s, b in spans
        if t == u and s < r and share_a_page(a, b)
    }
    across = {
        ("targets", t, "regions", r)
        for t, r, a in spans
        for u, _, b in spans
        if u < t and share_a_page(a, b)
    }
    assert {path for path, what in found if " overlaps " in what} == within
    assert {path for path, what in found if "claims the same memory" in what} == across
