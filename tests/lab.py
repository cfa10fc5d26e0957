"""Machines on one machine: each with its own processes, network, files in its home and ssh.

A machine is a set of namespaces with an sshd as its first process; ending that is a power cut. All
lie on a bridge that leads nowhere else. Made by root only.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
NEEDED = ("ip", "nsenter", "rsync", "unshare", "/usr/sbin/sshd", "ssh-keygen")
VENV = Path(sys.prefix)
MOUNT = "/mnt"  # where all machines see one folder

INIT = """
set -e
mount --make-rprivate /
mkdir -p {home}
for path in {shown}; do
    case $path in
        /root/*) inside={home}/${{path#/root/}} ;;
        /tmp/*) inside={folder}/tmp/${{path#/tmp/}} ;;
        *) continue ;;
    esac
    mkdir -p $inside
    mount --bind $path $inside
done
mount --bind {shared} {mount}
mount --bind {folder}/run /run
mount --bind {folder}/resolv.conf $(readlink -f /etc/resolv.conf)
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --rbind {home} /root
mkdir -p /run/sshd
cp {folder}/host_key /run/host_key
mount --rbind {folder}/tmp /tmp  # last: {folder} may be in it
hostname {name}
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f /dev/null -p 22 -h /run/host_key -o PidFile=none \\
    -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password -o StrictModes=no \\
    -o UsePAM=no -o MaxStartups=100
"""


class Machine:
    """One of a `Lab`'s."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self.folder = lab.folder / name
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def start(self) -> None:
        """With an empty /tmp and home."""
        for inside in ("tmp", "run", "root/.ssh"):
            (self.folder / inside).mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").chmod(0o1777)
        home = self.folder / "root"
        shutil.copy(self.lab.folder / "key.pub", home / ".ssh/authorized_keys")
        (home / ".bashrc").touch()
        if not (self.folder / "host_key").exists():
            keygen(self.folder / "host_key")
        # The name server of this machine is out of reach there: be refused, and do not wait.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        script = self.folder / "init.sh"
        shown = " ".join(shlex.quote(p) for p in (sys.base_prefix, str(VENV), str(REPO)))
        script.write_text(
            INIT.format(
                home=home, folder=self.folder, shown=shown, shared=self.lab.shared, mount=MOUNT,
                name=self.name,
            )
        )  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child",
                 "--mount-proc", "bash", str(script)],
                env={"PATH": os.environ["PATH"], "HOME": "/root"}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        wait_for(lambda: bool(children.read_text().split()), 30)
        self._init = int(children.read_text().split()[0])
        outside = f"to-{self.name}"
        ip("link", "add", outside, "netns", str(self.lab.switch), "type", "veth", "peer", "name",
           "eth0", "netns", str(self._init))  # fmt: skip
        inside_switch = ["nsenter", "-t", str(self.lab.switch), "-n", "ip", "link", "set", outside]
        subprocess.run([*inside_switch, "master", "bridge", "up"], check=True)
        if self.address:
            self.join(self.address)
        wait_for(lambda: self.run("grep -aq sshd /proc/1/cmdline").returncode == 0, 60)

    def join(self, address: str) -> None:
        """Give it an address on the network of all."""
        self.address = address
        # No packet leaves by the route; Ray looks at it to find its own address.
        line = f"ip addr add {address}/16 dev eth0; ip route replace default dev eth0 src {address}"
        inside = [
            "nsenter",
            "-t",
            str(self._init),
            "-n",
            "bash",
            "-c",
            f"ip link set eth0 up; {line}",
        ]
        subprocess.run(inside, check=True)

    def cut_power(self) -> None:
        """All of its processes and its network end at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def wipe(self) -> None:
        """Its disk, as of a machine that is new."""
        self.address = ""
        for inside in ("tmp", "run", "root"):
            shutil.rmtree(self.folder / inside, ignore_errors=True)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self, line: str, **environment: str) -> list[str]:
        """What runs a line of shell on it."""
        variables = {
            "HOME": "/root", "TERM": "xterm", "LANG": "C.UTF-8",
            "PATH": f"{VENV}/bin:{os.environ['PATH']}", **environment,
        }  # fmt: skip
        given = [f"{name}={value}" for name, value in variables.items()]
        inside = ["nsenter", "-t", str(self._init), "-m", "-p", "-n", "-u", "-i"]
        return [*inside, "env", "-i", *given, "bash", "-c", f"cd {shlex.quote(str(REPO))}; {line}"]

    def run(
        self, line: str, timeout_s: float = 600, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(line, **environment), capture_output=True, text=True, timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def processes(self) -> list[str]:
        """Command lines of all that runs on it but its sshd and this question."""
        lines = self.run("ps -eo args --no-headers").stdout.splitlines()
        return [line for line in lines if not line.startswith(("sshd:", "ps ", "bash -c"))]


class Lab:
    """Machines by name, from their addresses; `up` starts all of them."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self.shared = self.folder / "shared"
        self.shared.mkdir()
        keygen(self.folder / "key")
        self.switch = 0
        self._bridge: subprocess.Popen[bytes] | None = None
        self.machines = {name: Machine(self, name, a) for name, a in addresses.items()}

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def up(self) -> None:
        """Raises OSError where namespaces are not allowed or a program is missing."""
        missing = [name for name in NEEDED if shutil.which(name) is None]
        if missing:
            raise OSError(f"needs {', '.join(missing)}")
        if os.geteuid() != 0:
            raise OSError("needs root, for namespaces")
        made = "ip link add bridge type bridge && ip link set bridge up && exec sleep infinity"
        self._bridge = subprocess.Popen(
            ["unshare", "--net", "bash", "-c", made], start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.switch = self._bridge.pid
        shown = ["nsenter", "-t", str(self.switch), "-n", "ip", "link", "show", "bridge"]
        wait_for(lambda: subprocess.run(shown, capture_output=True).returncode == 0, 30)
        for machine in self.machines.values():
            machine.start()

    def down(self) -> None:
        for machine in self.machines.values():
            machine.cut_power()
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def machines(addresses: dict[str, str]) -> Iterator[Lab]:
    """For a fixture: a lab that runs; skips where namespaces are not allowed."""
    made = Lab(addresses)
    try:
        made.up()
    except OSError as error:
        made.down()
        pytest.skip(f"needs machines in namespaces: {error}")
    try:
        yield made
    finally:
        made.down()


def keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")


def wait_for(condition: Callable[[], object], limit_s: float, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise OSError(f"not within {limit_s:g} s")
        time.sleep(every_s)
