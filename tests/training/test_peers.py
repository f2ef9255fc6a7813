"""Lifelines and relays, both ends in this process."""

import queue
import socket
import threading
import time
import types

import pytest

from mmdiff.training import peers
from mmdiff.training.peers import Peers, _free_port


@pytest.fixture
def pair(request):
    """-> (process 0, process 1, what each found lost, the port of the service, the port where process 1's client finds it)."""
    lost = queue.Queue(), queue.Queue()
    first, second = (Peers(number, lost[number].put, silence=getattr(request, "param", 600.0)) for number in (0, 1))
    port = _free_port()
    joined = queue.Queue()
    threading.Thread(target=lambda: joined.put(second.connect("localhost", port)), daemon=True).start()
    time.sleep(0.1)  # process 0 comes later
    inner = first.serve(port)
    relay = joined.get(timeout=600)
    while not first._lifelines:
        time.sleep(0.01)
    yield first, second, lost, inner, relay
    for each in (first, second):
        each.leave(in_peace=True)


def cut(process):
    """As the kernel does it for a process that was killed."""
    for lifeline in process._lifelines:
        lifeline.shutdown(socket.SHUT_RDWR)


def test_the_relays_pass_bytes_both_ways_once_the_service_is_there(pair):
    *_, inner, relay = pair
    client = socket.create_connection(("127.0.0.1", relay), timeout=600)
    client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM")
    with socket.create_server(("127.0.0.1", inner)) as service:
        service.settimeout(600)
        served, _ = service.accept()
        assert served.recv(64) == b"PRI * HTTP/2.0\r\n\r\nSM"
        served.sendall(b"x" * 1_000_000)
        served.close()
    received = 0
    while received < 1_000_000:
        received += len(client.recv(1 << 16))
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):  # the end of the service is not passed on: JAX's client would abort
        client.recv(1)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_is_known_at_once(dead, pair):
    pair[dead]._closing = True
    cut(pair[dead])
    assert pair[2][1 - dead].get(timeout=600) == dead  # long before it would be silent for too long


@pytest.fixture
def mute(monkeypatch):
    monkeypatch.setattr(peers, "ALIVE", b"")


@pytest.mark.parametrize("pair", [4.0], indirect=True)
def test_a_process_that_falls_silent_is_known_later(mute, pair):
    found = {pair[2][number].get(timeout=600) for number in (0, 1)}  # nobody says anything
    assert found == {0, 1}


def test_a_process_is_heard_several_times_before_it_could_count_as_silent(monkeypatch):
    near, far = socket.socketpair()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            near.close()

    monkeypatch.setattr(peers, "time", types.SimpleNamespace(sleep=sleep))
    Peers(0, None, silence=8.0)._beat(near)
    assert far.recv(64) == 3 * peers.ALIVE and waits == [1.0] * 3
    far.close()


def test_a_process_that_leaves_in_peace_is_not_missed(pair):
    pair[1].leave(in_peace=True)
    time.sleep(0.2)
    cut(pair[1])
    time.sleep(0.2)
    assert pair[2][0].empty()


def test_a_process_that_fails_is_missed_and_misses_nobody(pair):
    pair[1].leave(in_peace=False)
    cut(pair[1])
    assert pair[2][0].get(timeout=600) == 1 and pair[2][1].empty()
