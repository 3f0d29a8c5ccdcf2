"""A network on this machine: each node in a namespace, on one switch, where packets may vanish.

    this process ──┐
    node "a" ──────┼── switch          addresses 198.18.<random>.1 (this process), .2, .3 ...
    node "b" ──────┘

A partition is a wrong hardware address in the neighbour table at both ends. Packets leave and reach
nobody, so nothing is reset and nothing is refused: whoever waits for an answer waits, as on a real
network whose switch has failed. Each node has a second interface, which takes the default route as
a management network does, and leads nowhere. Names are not resolved, and that is known at once:
torch asks for the name of a peer's address when a link is made, and would wait 9 s for no answer.
"""

import contextlib
import ctypes
import ipaddress
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_NOWHERE = "02:00:00:00:de:ad"
_CLONE_NEWNET = 0x40000000
_KILL_SECONDS = 20.0
_FOLDER = Path("/run/netns")


class Network:
    """A switch and its nodes; made and removed as root.

    Args:
        names: Of the nodes, at most 5 letters each.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._mark = secrets.token_hex(3)
        self._net = f"198.18.{secrets.randbelow(256)}"
        self._names = list(names)
        self._switch = f"{self._mark}-switch"
        self.address = f"{self._net}.1"  # of whoever is in no namespace

    def make(self) -> None:
        """Make it; whatever was made is left to ``remove`` after an error."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "name", "sw0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "sw0", "up")
        self._plug(self._host_port, self.address, namespace=None)
        for name in self._names:
            namespace = self.namespace(name)
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            self._plug("eth0", self.address_of(name), namespace)
            _ip(
                "-n",
                namespace,
                "link",
                "add",
                "name",
                "eth1",
                "type",
                "veth",
                "peer",
                "name",
                "end1",
            )
            _ip("-n", namespace, "addr", "add", "198.19.0.2/24", "dev", "eth1")
            _ip("-n", namespace, "link", "set", "eth1", "up")
            _ip("-n", namespace, "route", "add", "default", "via", "198.19.0.1")
            for server in _name_servers():
                _ip("-n", namespace, "route", "add", "unreachable", server)

    def remove(self) -> None:
        """Remove what was made; processes in it lose their network and live on."""
        if Path(f"/sys/class/net/{self._host_port}").exists():
            _ip("link", "del", self._host_port)  # deleting its namespace takes effect later
        for name in [*map(self.namespace, self._names), self._switch]:
            if (_FOLDER / name).exists():
                _ip("netns", "del", name)

    def namespace(self, name: str) -> str:
        """Name of a node's namespace, for ``ip netns exec`` and ``enter``."""
        return f"{self._mark}-{name}"

    def address_of(self, name: str) -> str:
        """Where the other nodes, and this process, reach a node."""
        return f"{self._net}.{self._names.index(name) + 2}"

    def part(self, one: str, *others: str) -> None:
        """Let nothing pass between a node and some others, in either direction."""
        for here, there in self._ways(one, others):
            wrong = [self.address_of(there), "lladdr", _NOWHERE, "dev", "eth0", "nud", "permanent"]
            _ip("-n", self.namespace(here), "neigh", "replace", *wrong)

    def heal(self, one: str, *others: str) -> None:
        """Let everything pass again."""
        for here, there in self._ways(one, others):
            _ip("-n", self.namespace(here), "neigh", "del", self.address_of(there), "dev", "eth0")

    def isolate(self, name: str) -> None:
        """Let nothing pass between a node and any other, this process included."""
        self.part(name, *self._all_but(name))
        to_here = [self.address, "lladdr", _NOWHERE, "dev", "eth0", "nud", "permanent"]
        _ip("-n", self.namespace(name), "neigh", "replace", *to_here)

    def rejoin(self, name: str) -> None:
        """End an isolation."""
        self.heal(name, *self._all_but(name))
        _ip("-n", self.namespace(name), "neigh", "del", self.address, "dev", "eth0")

    def _all_but(self, name: str) -> list[str]:
        return [other for other in self._names if other != name]

    @staticmethod
    def _ways(one: str, others: Sequence[str]) -> list[tuple[str, str]]:
        return [(one, other) for other in others] + [(other, one) for other in others]

    @property
    def _host_port(self) -> str:
        return f"anti{self._mark}"

    def _plug(self, interface: str, address: str, namespace: str | None) -> None:
        """Connect a namespace, or this process's, to the switch."""
        port = f"p{address.rpartition('.')[2]}"
        inside = ["netns", namespace] if namespace else []
        peer = ["type", "veth", "peer", "name", port, "netns", self._switch]
        _ip("link", "add", "name", interface, *inside, *peer)
        within = ["-n", namespace] if namespace else []
        _ip(*within, "addr", "add", f"{address}/24", "dev", interface)
        _ip(*within, "link", "set", interface, "up")
        _ip("-n", self._switch, "link", "set", port, "master", "sw0")
        _ip("-n", self._switch, "link", "set", port, "up")


def why_not() -> str | None:
    """Why no network can be made here, or None if one can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if shutil.which("ip") is None:
        return "namespaces need iproute2's command ip"
    probe = Network(["x"])
    try:
        probe.make()
    except subprocess.CalledProcessError as error:
        return f"namespaces cannot be made: {error.stderr.strip()}"
    finally:
        probe.remove()
    return None


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """A network for a ``with`` block."""
    made = Network(names)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def enter(namespace: str) -> None:
    """Move the calling thread, and what it starts from now on, to a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_FOLDER / namespace).open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _name_servers() -> list[str]:
    """Those that a namespace would look for beyond its own interfaces."""
    file = Path("/etc/resolv.conf")
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    servers = {words[1] for words in lines if words[:1] == ["nameserver"] and len(words) > 1}
    addresses = map(ipaddress.ip_address, servers)
    return [str(each) for each in addresses if each.version == 4 and not each.is_loopback]


def kill_all_in(namespace: str) -> None:
    """End every process in a namespace with SIGKILL, but for this one; on return none is left.

    All are sent the signal before any is waited for, as when a machine is switched off. Not to be
    called from within the namespace, where it would find its own helper.
    """
    deadline = time.monotonic() + _KILL_SECONDS
    while left := {int(pid) for pid in _ip("netns", "pids", namespace).split()} - {os.getpid()}:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"processes {left} survive SIGKILL"
        time.sleep(0.02)


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
