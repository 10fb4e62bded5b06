"""Hosts of a cluster on one machine: each has a network, a name and processes of its own."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ADDRESSES = "10.77.0.1", "10.77.0.2"
# Contents of /etc/hosts: names stand for addresses or, as in Debian, for the loopback.
NAMES = {
    "addresses": "127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n",
    "loopback": "127.0.0.1 localhost\n127.0.1.1 host0 host1\n",
}
_UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]


class Host:
    """Namespaces of a host; `stop` ends every process in them, and leaves its end of the wire."""

    def __init__(self, number: int, names: Path) -> None:
        self.address = ADDRESSES[number]
        ready = f"hostname host{number} && mount --bind {names} /etc/hosts && ip link set lo up"
        command = [*_UNSHARE, "--mount-proc", "sh", "-c", f"{ready} && echo ready && sleep 3600"]
        self._outside = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._outside.stdout is not None
        with self._outside.stdout as said:
            line = said.readline()
        if line != "ready\n":
            self.stop()
            raise OSError(line.strip())
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children")
        self.pid = int(children.read_text().split()[0])
        # While this is open the wire stays, and with it the other host's own address.
        self.network = open(f"/proc/{self.pid}/ns/net")  # noqa: SIM115

    def inside(self, *command: str) -> list[str]:
        """The command line of this command on the host."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", f"--wd={os.getcwd()}"]
        return [*enter, "--", *command]

    def call(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True)

    def unplug(self) -> None:
        """From now on nothing reaches the host, and nothing leaves it."""
        self.call("ip", "link", "set", "eth0", "down")

    def stop(self) -> None:
        """End every process of the host; its connections break."""
        self._outside.kill()
        self._outside.wait()


@contextmanager
def two_hosts(names: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire; raises OSError where namespaces cannot be made."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "hosts")
        file.write_text(NAMES[names])
        hosts = []
        for number in range(2):
            hosts.append(Host(number, file))
            stack.enter_context(hosts[-1].network)
            stack.callback(hosts[-1].stop)
        a, b = hosts
        ends = ["netns", str(a.pid), "type", "veth", "peer", "eth0", "netns", str(b.pid)]
        subprocess.run(["ip", "link", "add", "eth0", *ends], check=True)
        for host in hosts:
            host.call("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.call("ip", "link", "set", "eth0", "up")
        yield a, b


@functools.cache
def missing() -> str:
    """Why such hosts cannot be made here; empty where they can."""
    tools = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)} (util-linux, iproute2)"
    try:
        with two_hosts("addresses"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here: {error}"
