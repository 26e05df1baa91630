"""The framing of the control socket, and the interface description it is checked against."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ksmd.daemon import interface
from ksmd.daemon.protocol import (
    INTERFACE,
    MAX_DEPTH,
    MAX_MESSAGE,
    CallMessage,
    Decoder,
    ProtocolError,
    ReplyMessage,
    encode,
    encode_call,
    encode_reply,
    parse_call,
    parse_reply,
)
from ksmd.model.features import Feature
from ksmd.model.refusal import Reason, Refusal
from ksmd.model.status import Status, TargetStatus


def decode(data: bytes, **limits: int) -> list[dict]:
    decoder = Decoder(**limits)
    decoder.feed(data)
    messages = []
    while (message := decoder.next()) is not None:
        messages.append(message)
    return messages


def test_a_call_survives_the_wire_whatever_its_flags():
    for more in (False, True):
        for oneway in (False, True):
            call = CallMessage("org.ksmd.Control.Why", {"pid": 7, "text": "ä\0😀"}, more, oneway)
            (message,) = decode(encode_call(call))
            assert parse_call(message) == call


def test_replies_and_errors_survive_the_wire():
    for reply in (
        ReplyMessage({"pages": 3}, continues=True),
        ReplyMessage({"pages": 3}),
        ReplyMessage({"pid": 9}, error="org.ksmd.Control.NotRegistered"),
    ):
        (message,) = decode(encode_reply(reply))
        assert parse_reply(message) == reply


def test_one_message_byte_by_byte_comes_out_once_and_whole():
    data = encode({"method": "a.B", "parameters": {"x": [1, {"y": "]}"}]}})
    decoder = Decoder()
    for byte in data[:-1]:
        decoder.feed(bytes([byte]))
        assert decoder.next() is None
    decoder.feed(data[-1:])
    assert decoder.next() == {"method": "a.B", "parameters": {"x": [1, {"y": "]}"}]}}
    assert decoder.next() is None
    assert len(decoder) == 0


def test_messages_wait_in_the_decoder_until_they_are_asked_for():
    data = encode({"n": 1}) + encode({"n": 2})
    decoder = Decoder()
    decoder.feed(data + b'{"n"')
    assert decoder.next() == {"n": 1}
    assert len(decoder) == len(encode({"n": 2})) + 4
    assert decoder.next() == {"n": 2}
    assert decoder.next() is None


@pytest.mark.parametrize(
    "wrong",
    [
        b"\0",
        b"[]\0",
        b"7\0",
        b"{\0",
        b"\xff{}\0",
        b'{"a": NaN}\0',
        b'{"a": Infinity}\0',
        b'{"a": 1, "a": 2}\0',
        b'{"a": "\x01"}\0',
        b"9" * 5000 + b"\0",
        b'{"a":' + b"9" * 5000 + b"}\0",
        b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}\0",
        b"[" * 500_000 + b"\0",
    ],
)
def test_what_is_no_json_object_breaks_the_connection_for_good(wrong):
    decoder = Decoder()
    decoder.feed(wrong)
    with pytest.raises(ProtocolError):
        decoder.next()
    with pytest.raises(ProtocolError):
        decoder.next()
    with pytest.raises(ProtocolError):
        decoder.feed(b"{}\0")


def test_nesting_up_to_the_limit_is_understood_and_brackets_in_strings_do_not_count():
    deep = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}\0"
    assert len(decode(deep)) == 1
    (message,) = decode(b'{"a": "' + b'[{\\"' * 1000 + b'"}\0')
    assert message["a"] == '[{"' * 1000


def test_a_message_of_the_greatest_length_passes_and_one_byte_more_does_not():
    frame = len(b'{"a":""}')
    assert len(decode(b'{"a":"' + b"x" * (MAX_MESSAGE - frame) + b'"}\0')) == 1
    with pytest.raises(ProtocolError, match="longer"):
        decode(b'{"a":"' + b"x" * (MAX_MESSAGE - frame + 1) + b'"}\0')


def test_an_endless_message_is_refused_before_its_end():
    decoder = Decoder()
    decoder.feed(b"x" * MAX_MESSAGE)
    assert decoder.next() is None
    decoder.feed(b"x")
    with pytest.raises(ProtocolError, match="longer"):
        decoder.next()
    assert len(decoder) == 0


@pytest.mark.parametrize("wrong", [{"a": float("nan")}, {"a": b""}, {"a": "x" * MAX_MESSAGE}])
def test_what_cannot_be_sent_is_refused_by_the_sender(wrong):
    with pytest.raises(ProtocolError):
        encode(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"method": 7},
        {"method": "a.B", "parameters": []},
        {"method": "a.B", "more": 1},
        {"method": "a.B", "upgrade": True},
        {"method": "a.B", "upgrade": 0},
        {"method": None},
        {"parameters": {}},
    ],
)
def test_a_malformed_call_is_refused(wrong):
    with pytest.raises(ProtocolError):
        parse_call(wrong)


def test_a_call_may_name_every_field_that_varlink_has():
    bare = {"parameters": None, "more": None, "oneway": False, "upgrade": False}
    assert parse_call({"method": "a.B", **bare}) == CallMessage("a.B")
    assert parse_call({"method": "a.B", **bare, "upgrade": None}) == CallMessage("a.B")


def test_a_malformed_reply_is_refused():
    for wrong in ({"parameters": 1}, {"continues": "yes"}, {"error": None}, {"method": "x"}):
        with pytest.raises(ProtocolError):
            parse_reply(wrong)


# -- the interface description ---------------------------------------------------------------------


CONTROL = interface.load()


def test_every_method_of_the_contract_is_described():
    assert CONTROL.name == INTERFACE
    assert set(CONTROL.methods) >= {
        "GetApiVersion",
        "Status",
        "Targets",
        "Scan",
        "Unmerge",
        "Pause",
        "Resume",
        "Features",
        "Reload",
        "Plan",
        "Why",
    }


def test_the_description_names_only_types_that_it_defines():
    def named(kind: interface.Kind) -> set[str]:
        inner = [*kind.fields.values(), *([kind.inner] if kind.inner else [])]
        return {kind.name} - {""} | {name for part in inner for name in named(part)}

    kinds = [*CONTROL.types.values(), *CONTROL.errors.values()]
    for method in CONTROL.methods.values():
        kinds += [method.takes, method.gives]
    assert {name for kind in kinds for name in named(kind)} == set(CONTROL.types)


def test_the_models_are_what_the_description_says():
    target = TargetStatus(pid=1, name="n", domain="d", stop_ms_p99=1.5)
    status = json.loads(json.dumps(dataclasses.asdict(Status(targets=[target]))))
    assert CONTROL.gives("Status", status) is None
    assert CONTROL.gives("Targets", {"targets": status["targets"]}) is None
    feature = dataclasses.asdict(Feature("pagemap", True, True, "", "nothing is merged"))
    assert CONTROL.gives("Features", {"features": [feature]}) is None
    refusal = Refusal(Reason.MEMORY, "pid 7")
    reply = {**dataclasses.asdict(refusal), "sentence": refusal.sentence}
    assert CONTROL.gives("Unmerge", {"pages": 0, "refused": [reply]}) is None


@pytest.mark.parametrize(
    ("method", "parameters", "wrong"),
    [
        ("Status", {}, None),
        ("Status", {"x": 1}, "x"),
        ("Scan", {}, None),
        ("Scan", {"wait": None}, None),
        ("Scan", {"wait": True, "until_settled": False}, None),
        ("Scan", {"wait": 1}, "wait"),
        ("Unmerge", {"pid": True}, "pid"),
        ("Unmerge", {"pid": 1.0}, "pid"),
        ("Why", {}, "pid"),
        ("Why", {"pid": None}, "pid"),
        ("Why", {"pid": 1, "address": 4096}, None),
        ("Why", {"pid": 1, "address": "0x1000"}, "address"),
        ("Why", [], ""),
    ],
)
def test_a_wrong_parameter_is_named(method, parameters, wrong):
    assert CONTROL.takes(method, parameters) == wrong


def test_wrong_replies_are_found_inside_arrays_and_dictionaries():
    status = dataclasses.asdict(Status())
    assert CONTROL.gives("Status", {**status, "refusals": {"gone": "1"}}) == "refusals[gone]"
    assert CONTROL.gives("Status", {**status, "targets": [{}]}) == "targets[0].pid"
    assert CONTROL.gives("Status", {**status, "targets": {}}) == "targets"


def test_the_whole_type_language_is_understood():
    parsed = interface.parse(
        "# head\ninterface a.b\ntype E (one, two)\ntype S (e: E, f: ?float, o: object)\n"
        "method M(s: []S, d: [string](x: int)) -> ()\nerror X ()\n"
    )
    good = {"s": [{"e": "one", "f": 1, "o": [None]}], "d": {"k": {"x": 1}}}
    assert parsed.takes("M", good) is None
    assert parsed.takes("M", {**good, "s": [{"e": "three", "o": 1}]}) == "s[0].e"
    assert parsed.takes("M", {**good, "d": {"k": {}}}) == "d[k].x"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "interface",
        "interface a.b method",
        "interface a.b\nmethod M() -> (x: )",
        "interface a $",
    ],
)
def test_a_wrong_description_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|unexpected"):
        interface.parse(text)
