"""The first free port of a few, whoever else looks for one."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from antiphon.errors import ConfigError
from antiphon.listening import listen

HOST = "127.0.0.1"


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def test_any_free_port_is_taken_by_default() -> None:
    with listen(HOST) as first, listen(HOST) as second:
        assert 0 not in {port_of(first), port_of(second)}
        assert port_of(first) != port_of(second)
        socket.create_connection((HOST, port_of(first)), timeout=5).close()


def test_the_first_free_port_of_a_range_is_taken_and_given_back() -> None:
    with listen(HOST) as taken, listen(HOST) as free:
        ports = [port_of(taken), port_of(free)]
        free.close()
        with listen(HOST, ports) as found:
            assert port_of(found) == ports[1]
            with pytest.raises(ConfigError, match=rf"all 2 ports from {ports[0]} on are taken"):
                listen(HOST, ports)
        with listen(HOST, ports) as again:
            assert port_of(again) == ports[1]


def test_processes_that_look_at_once_find_different_ports() -> None:
    with listen(HOST) as below:
        first = port_of(below) + 1
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: listen(HOST, range(first, first + 64)), range(24)))
        assert len({port_of(one) for one in found}) == 24
        for one in found:
            one.close()


def test_an_address_of_another_machine_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        listen("192.0.2.1", [20100, 20101])
