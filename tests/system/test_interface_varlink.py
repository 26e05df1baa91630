"""A Varlink client that is not ours: it knows of ksmd what ksmd says of itself, and no more."""

from __future__ import annotations

import json
import sys

import pytest
import varlink
from harness import PAGE, run

pytestmark = pytest.mark.root

CONTROL = "org.ksmd.Control"


@pytest.fixture
def daemon(open_daemons):
    return open_daemons()


@pytest.fixture
def client(daemon):
    with varlink.Client(f"unix:{daemon.socket}") as client:
        yield client


def test_it_finds_the_interfaces_and_reads_their_descriptions(client):
    with client.open("org.varlink.service") as service:
        info = service.GetInfo()
        assert (info["product"], info["interfaces"]) == ("ksmd", [CONTROL, "org.varlink.service"])
        for name in info["interfaces"]:
            text = service.GetInterfaceDescription(name)["description"]
            assert varlink.Interface(text).name == name


def test_it_calls_methods_and_checks_their_types_by_the_description(client, daemon):
    with client.open(CONTROL) as ksmd:
        assert ksmd.GetApiVersion() == {"version": 1}
        status = ksmd.Status()
        assert status["targets"] == []
        assert status["paused"] is True
        assert {feature["name"] for feature in ksmd.Features()["features"]}
        ksmd.StartStopThread(5000, 10, 20, 0)
        assert ksmd.GetInfoThread() == {
            "sleep": 5000,
            "pages_to_scan": 10,
            "max_pages_to_merge": 20,
            "flags": 0,
        }


def test_it_registers_scans_and_shares(client, puppets):
    two = [puppets(None, uid=0, pages=32) for _ in range(2)]
    with client.open(CONTROL) as ksmd:
        sma = ksmd.CreateSharedMemoryArea()["sma"]
        for puppet in two:
            answer = ksmd.RegisterMemoryRegion(sma, puppet.address, 32, "d", puppet.pid)
            assert answer == {"domain": "d"}
        assert ksmd.Share(sma)["merged"] == 32
        assert ksmd.RemoveMemoryRegion(sma, True) == {"regions": 2}
    assert all(puppet.intact() for puppet in two)


def test_it_meets_errors_by_their_names(client):
    with client.open(CONTROL) as ksmd:
        with pytest.raises(varlink.VarlinkError) as error:
            ksmd.Share(12345)
        assert error.value.error() == f"{CONTROL}.NoSuchArea"
        assert error.value.parameters()["sma"] == 12345
        sma = ksmd.CreateSharedMemoryArea()["sma"]
        with pytest.raises(varlink.VarlinkError) as error:
            ksmd.RegisterMemoryRegion(sma, PAGE + 1, 1)
        assert error.value.error() == f"{CONTROL}.InvalidRegion"
        with pytest.raises(varlink.VarlinkError) as error:
            ksmd.Monitor()
        assert error.value.error() == "org.varlink.service.ExpectedMore"


def test_it_follows_a_stream(client, daemon, puppets):
    puppet = puppets(daemon.socket)
    with client.open(CONTROL) as ksmd:
        replies = ksmd.Monitor(_more=True)
        assert next(replies) == {"events": []}
        puppet.register()
        puppet.share()
        puppet.kill()
        (event,) = next(replies)["events"]
        assert (event["event"], event["pid"]) == ("target_gone", puppet.pid)


# -- the command that comes with it ----------------------------------------------------------------


def tool(*arguments: str):
    return run(sys.executable, "-m", "varlink.cli", *arguments)


def test_the_varlink_command_lists_describes_and_calls(daemon):
    address = f"unix:{daemon.socket}"
    assert f"   {CONTROL}\n" in tool("info", address).stdout
    text = tool("help", f"{address}/{CONTROL}").stdout
    assert f"interface {CONTROL}\n" in text
    assert "# Make a shared memory area (KSM_CREATE_SHARED_MEMORY_AREA)" in text
    done = tool("call", f"{address}/{CONTROL}.GetApiVersion")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"version": 1})
    # it does not leave with another code, but says which error it was
    failed = tool("call", f"{address}/{CONTROL}.Why", json.dumps({"pid": 1}))
    assert f"{CONTROL}.NotRegistered" in failed.stderr


def test_the_varlink_command_is_told_of_every_pass(daemon):
    method = f"unix:{daemon.socket}/{CONTROL}.Scan"
    done = tool("call", "-m", method, json.dumps({"wait": True, "until_settled": True}))
    *passes, last = json.loads("[" + done.stdout.replace("}\n{", "},\n{") + "]")
    assert passes
    assert last == passes[-1]
    assert last["settled"] is True
