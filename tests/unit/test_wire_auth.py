"""Keys: which addresses are remote, where they lie, who may read them."""

from __future__ import annotations

import stat

import pytest

from offtrail.platform.wire.auth import ClientKeys, ServerKeys, is_remote, make_keys, new_keys
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.sockets import Endpoint, Server, WaitError

LOOPBACK, _ = new_keys("127.0.0.1")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_is_not_remote(address):
    assert not is_remote(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.7", "192.168.1.1", "::", "node-3", "*", "localhost.evil.org"])
def test_any_other_address_is_remote(address):
    assert is_remote(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_keys_are_made_per_run_and_only_their_owner_reads_them(tmp_path, address):
    server = make_keys(tmp_path, address)
    client = ClientKeys.read(tmp_path)
    assert server == ServerKeys.read(tmp_path)
    if address == "127.0.0.1":
        assert len(client.password) == 64
        assert (server, client) == (ServerKeys(client.password), ClientKeys(client.password))
    else:
        assert server.allowed == (client.public,)
        assert len({server.public, server.secret, client.public, client.secret}) == 4
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    for name in ("server.json", "client.json"):
        assert stat.S_IMODE((tmp_path / "keys" / name).stat().st_mode) == 0o600
    assert make_keys(tmp_path, address) != server


@pytest.mark.parametrize("keys", [ClientKeys, ServerKeys])
def test_keys_that_are_not_there_are_named(tmp_path, keys):
    with pytest.raises(ValueError, match=r"keys/\w+\.json cannot be read .*: the run's start makes it"):
        keys.read(tmp_path)


def test_a_server_that_others_can_reach_wants_keys_and_says_the_way_out():
    with pytest.raises(ValueError, match=r"broker\.address=0\.0\.0\.0 .* broker\.address=127\.0\.0\.1"):
        Server("0.0.0.0", 0, LOOPBACK)


def test_an_address_of_another_host_is_named():
    with pytest.raises(ValueError, match=r"broker\.address=no\.such\.host\.invalid"):
        Server("no.such.host.invalid", 0, new_keys("no.such.host.invalid")[0])


def test_a_taken_port_is_named():
    server = Server("127.0.0.1", 0, LOOPBACK)
    port = int(server.endpoint.url.rsplit(":", 1)[1])
    try:
        with pytest.raises(ValueError, match=rf"broker\.port={port} cannot be bound"):
            Server("127.0.0.1", port, LOOPBACK)
    finally:
        server.close()


def test_the_endpoint_file_is_private_and_whole(tmp_path):
    path = tmp_path / "endpoint.json"
    endpoint = Endpoint("tcp://127.0.0.1:9", "tcp://127.0.0.1:10", "key")
    endpoint.write(path)
    assert Endpoint.read(path, 0.0) == endpoint
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["endpoint.json"]


def test_a_missing_endpoint_file_is_a_named_wait(tmp_path):
    with pytest.raises(
        WaitError, match=r"waited for the endpoint file from the broker .*endpoint\.json.* since .* 0\.05 s"
    ):
        Endpoint.read(tmp_path / "endpoint.json", 0.05)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "x"}', '{"url": "a", "hints_url": "b", "port": 3}'])
def test_a_file_that_is_no_endpoint_is_named(tmp_path, text):
    path = tmp_path / "endpoint.json"
    path.write_text(text)
    with pytest.raises(WireError, match=r"endpoint\.json is not an endpoint"):
        Endpoint.read(path, 0.0)
