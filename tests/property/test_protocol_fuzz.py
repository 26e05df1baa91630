"""Whatever bytes arrive, the decoder gives messages, asks for more, or refuses."""

from __future__ import annotations

import contextlib
import random

from hypothesis import given
from hypothesis import strategies as st

from ksmd.daemon import interface
from ksmd.daemon.protocol import (
    Decoder,
    ProtocolError,
    encode,
    parse_call,
    parse_reply,
)

NEARLY_JSON = st.lists(
    st.sampled_from(
        [
            *rb'{ } [ ] " \ : , 1 e9 - null true "method" "parameters" "a.B" \ud800'.split(),
            *(b"\0", b" ", b"\xff", b"\xed\xa0\x80"),
        ]
    ),
    max_size=60,
).map(b"".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)
CONTROL = interface.load()
MESSAGES = st.dictionaries(st.text(max_size=10), VALUES, max_size=5)


def drain(chunks: list[bytes], limit: int) -> tuple[list[dict], bool]:
    decoder = Decoder(max_message=limit)
    messages = []
    try:
        for chunk in chunks:
            decoder.feed(chunk)
            while (message := decoder.next()) is not None:
                messages.append(message)
            assert len(decoder) <= limit
    except ProtocolError:
        return messages, True
    return messages, False


def cut(data: bytes, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(5)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.binary(max_size=400) | NEARLY_JSON, st.integers(0, 1000), st.integers(0, 300))
def test_any_bytes_in_any_pieces_end_the_same_way(data, seed, limit):
    whole = drain([data], limit)
    pieces = drain(cut(data, seed), limit)
    single = drain([data[i : i + 1] for i in range(len(data))], limit)
    assert whole == pieces == single
    for message in whole[0]:
        for parse in (parse_call, parse_reply):
            with contextlib.suppress(ProtocolError):
                parse(message)


@given(st.lists(MESSAGES, max_size=5), st.integers(0, 1000))
def test_what_was_encoded_is_decoded_in_order(messages, seed):
    data = b"".join(encode(message) for message in messages)
    assert drain(cut(data, seed), 1 << 20) == (messages, False)


@given(MESSAGES)
def test_any_parameters_are_either_right_or_named(parameters):
    for name in CONTROL.methods:
        for check in (CONTROL.takes, CONTROL.gives):
            wrong = check(name, parameters)
            assert wrong is None or isinstance(wrong, str)


@given(st.text(alphabet="interfacmthodyp ab.BC()->:,?[]#\n", max_size=200))
def test_any_description_is_parsed_or_refused(text):
    with contextlib.suppress(ValueError):
        interface.parse("interface a.b\n" + text)
