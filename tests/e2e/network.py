"""Machines that are network namespaces on one wire, where frames from one to another get lost on demand.

The wire is a bridge in a namespace of its own, so that this machine's packet filters have no say in it. A cut is one entry of the
sender's neighbour table: it then addresses its frames for the receiver to a hardware address that nobody has. They leave, nobody
takes them, and nobody is told: what a broken switch does, in one direction, between two machines, without a kernel module beyond veth
and bridge.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

HERE = "here"  # the machine that the tests, and mounts without a word, run on
PREFIX = "ebb-e2e-"
NOBODY = "02:eb:bb:00:00:ff"


class Impossible(Exception):
    """No namespaces can be made here."""


def ip(*args, within=None, run=subprocess.run):
    command = ["ip", *(["-n", within] if within else []), *map(str, args)]
    p = run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode != 0:
        raise Impossible(f"{' '.join(command)}: {p.stderr.strip()}")
    return p.stdout


class Hand:
    """Runs commands in the place of this process. A child of this one has the files open that its threads write to in a mount, closes
    them before it is another program, and waits there for what a cut holds up; this child is older than those files."""

    LOOP = """
import json, subprocess, sys
for line in sys.stdin:
    asked = json.loads(line)
    try:
        p = subprocess.run(asked["command"], env=asked["env"], timeout=asked["timeout"], text=True, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        said = [p.returncode, p.stdout, p.stderr]
    except (OSError, subprocess.TimeoutExpired) as e:
        said = [-1, "", str(e)]
    print(json.dumps(said), flush=True)
"""

    def __init__(self):
        # Not of this process's group: what stops that one is not to stop the cleaning up.
        self.process = subprocess.Popen([sys.executable, "-c", self.LOOP], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True)

    def run(self, command, env=None, timeout=60, **_):
        self.process.stdin.write(json.dumps({"command": command, "env": env, "timeout": timeout}) + "\n")
        self.process.stdin.flush()
        return subprocess.CompletedProcess(command, *json.loads(self.process.stdout.readline()))

    def end(self):
        self.process.kill()
        self.process.communicate()


class Network:
    """Machines by name, `here` among them, each with an address."""

    def __init__(self, *names):
        self.names = [HERE, *names]
        self.cuts = 0
        self.net = f"198.{18 + os.getpid() % 2}.{os.getpid() // 2 % 256}"  # for tests of networks (RFC 2544)
        self.link = f"ebb{os.getpid()}"
        self.lost = set()
        self.hand = Hand()

    def namespace(self, name):
        return None if name == HERE else f"{PREFIX}{os.getpid()}-{name}"

    def device(self, name):
        return self.link if name == HERE else "eth0"

    def address(self, name):
        return f"{self.net}.{self.names.index(name) + 1}"

    def hardware(self, name):
        return f"02:eb:bb:00:00:{self.names.index(name) + 1:02x}"

    def inside(self, name):
        """What to put before a command that is to run there. The process is the command's own; only its network is another."""
        return [] if name == HERE else ["nsenter", f"--net=/run/netns/{self.namespace(name)}"]

    # -- the wire ------------------------------------------------------------
    def build(self):
        wire = self.namespace("wire")
        ip("netns", "add", wire)
        ip("link", "add", "wire", "type", "bridge", within=wire)
        ip("link", "set", "wire", "up", within=wire)
        for i, name in enumerate(self.names):
            there, device = self.namespace(name), self.device(name)
            if there:
                ip("netns", "add", there)
                ip("link", "set", "lo", "up", within=there)
            # From the machine's side: the device that this one has goes when the wire's namespace does.
            ip("link", "add", device, "address", self.hardware(name), "type", "veth", "peer", "name", f"port{i}",
               "netns", wire, within=there)
            ip("link", "set", f"port{i}", "master", "wire", "up", within=wire)
            ip("address", "add", f"{self.address(name)}/24", "dev", device, within=there)
            ip("link", "set", device, "up", within=there)
        for a, b in itertools.permutations(self.names, 2):
            self.reaches(a, b, True)

    def reaches(self, a, b, well):
        ip("neighbour", "replace", self.address(b), "lladdr", self.hardware(b) if well else NOBODY, "dev", self.device(a),
           "nud", "permanent", within=self.namespace(a), run=self.hand.run)

    # -- what happens to it ----------------------------------------------------
    def cut(self, a, b, back=True):
        """What `a` sends to `b` is lost from now on; with `back` also what `b` sends to `a`."""
        for x, y in [(a, b), (b, a)][: 2 if back else 1]:
            if (x, y) not in self.lost:
                self.reaches(x, y, False)
                self.lost.add((x, y))
                self.cuts += 1

    def heal(self):
        for a, b in sorted(self.lost):
            self.reaches(a, b, True)
        self.lost.clear()

    def destroy(self):
        self.hand.end()
        sweep(os.getpid())


def sweep(mine=None):
    """Takes down what this process built, or what processes that are no more left behind."""
    found = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    for name in found:
        match = re.fullmatch(rf"{PREFIX}(\d+)-\w+", name)
        if not match:
            continue
        owner = int(match[1])
        if owner != mine and (mine is not None or os.path.exists(f"/proc/{owner}")):
            continue
        with contextlib.suppress(Impossible):
            for pid in ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(Impossible):
            ip("netns", "delete", name)
        with contextlib.suppress(Impossible):
            ip("link", "delete", f"ebb{owner}")


@contextlib.contextmanager
def network(*names):
    """Machines, gone afterwards with all that runs there."""
    if os.geteuid() != 0:
        raise Impossible("network namespaces need root")
    for program in ["ip", "nsenter"]:
        if not shutil.which(program):
            raise Impossible(f"{program} is not installed")
    sweep()
    net = Network(*names)
    try:
        net.build()
        yield net
    finally:
        net.destroy()
