"""Keys: which addresses need them, where they lie, who may read them."""

from __future__ import annotations

import stat

import pytest

from offtrail.platform.wire.auth import ClientKeys, ServerKeys, is_remote, make_keys
from offtrail.platform.wire.codec import WireError
from offtrail.platform.wire.sockets import Client, Endpoint, Server, WaitError


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(address):
    assert not is_remote(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.7", "192.168.1.1", "::", "node-3", "*", "localhost.evil.org"])
def test_any_other_address_is_remote(address):
    assert is_remote(address)


def test_keys_are_made_per_run_and_only_their_owner_reads_them(tmp_path):
    server = make_keys(tmp_path, "0.0.0.0")
    client = ClientKeys.read(tmp_path)
    assert server == ServerKeys.read(tmp_path)
    assert server is not None
    assert client is not None
    assert server.allowed == {client.public}
    assert len({server.public, server.secret, client.public, client.secret}) == 4
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    for name in ("server.json", "client.json"):
        assert stat.S_IMODE((tmp_path / "keys" / name).stat().st_mode) == 0o600
    again = make_keys(tmp_path, "0.0.0.0")
    assert again != server


def test_on_loopback_keys_of_an_earlier_start_are_removed(tmp_path):
    make_keys(tmp_path, "0.0.0.0")
    assert make_keys(tmp_path, "127.0.0.1") is None
    assert ServerKeys.read(tmp_path) is None
    assert ClientKeys.read(tmp_path) is None


def test_a_server_that_others_can_reach_wants_keys_and_says_the_way_out():
    with pytest.raises(ValueError, match=r"broker\.address=0\.0\.0\.0 .* broker\.address=127\.0\.0\.1"):
        Server("0.0.0.0")


def test_an_address_of_another_host_is_named():
    with pytest.raises(ValueError, match=r"broker\.address=no\.such\.host\.invalid"):
        Server("no.such.host.invalid", 0, ServerKeys("", "", frozenset()))


def test_a_taken_port_is_named():
    server = Server("127.0.0.1")
    port = int(server.endpoint.url.rsplit(":", 1)[1])
    try:
        with pytest.raises(ValueError, match=rf"broker\.port={port} cannot be bound"):
            Server("127.0.0.1", port)
    finally:
        server.close()


def test_a_client_without_keys_is_told_before_it_dials():
    with pytest.raises(ValueError, match="requires CURVE keys"):
        Client(Endpoint("tcp://127.0.0.1:9", "tcp://127.0.0.1:9", "k" * 40), "a", None)


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
