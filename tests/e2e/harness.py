"""What the end-to-end tests share: clusters of real processes, trees of real files, foreign tools.

Nothing here is a stand-in: `ebb up` starts the servers, the mount is a kernel mount, s5cmd and moto
are programs of other people.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EBB = "ebb"  # set by run.py


class Failure(AssertionError):
    """A property that did not hold."""


def check(condition, message):
    if not condition:
        raise Failure(message)


def wait_for(what, condition, seconds=60.0, pause=0.05):
    """Polls a condition; a bounded wait for something that must happen, never a fixed sleep."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failure(f"waited {seconds} s in vain for: {what}")
        time.sleep(pause)


class Cluster:
    """A local cluster in a directory of its own."""

    run = staticmethod(subprocess.run)

    def __init__(self, directory, **up):
        self.dir = Path(directory)
        self.up_options = up
        self.mounts = []
        self.extra_env = {}

    # -- commands ----------------------------------------------------------
    def env(self):
        env = dict(os.environ, EBB_DIR=str(self.dir), **self.extra_env)
        env.pop("EBB_CLUSTER", None)
        return env

    def ebb(self, *args, ok=True, timeout=300, inside=()):
        p = self.run([*inside, EBB, *map(str, args)], env=self.env(), text=True, timeout=timeout,
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if ok and p.returncode != 0:
            raise Failure(f"ebb {' '.join(map(str, args))}: exit {p.returncode}: {p.stderr.strip()}\n{p.stdout[-2000:]}{self.logs()}")
        return p

    def up(self, inside=(), **more):
        options = {"nodes": 2, "node_capacity": "1GiB", "flush_after": 600000, **self.up_options, **more}
        args = []
        for name, value in options.items():
            args += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return self.ebb("up", "--detach", *args, inside=inside)

    def down(self, *args, **kw):
        self.umount_all()
        return self.ebb("down", *args, **kw)

    def status(self):
        return json.loads(self.ebb("status", "--json").stdout)

    def mount(self, name="mnt", *args, inside=()):
        path = self.dir.parent / name
        path.mkdir(exist_ok=True)
        self.ebb("mount", *args, path, inside=inside)
        self.mounts.append(path)
        return path

    def umount(self, path):
        self.ebb("umount", path)
        self.mounts.remove(path)

    def umount_all(self):
        for path in list(self.mounts):
            self.umount(path)

    # -- processes ---------------------------------------------------------
    def pid(self, name):
        try:
            return int((self.dir / "run" / f"{name}.pid").read_text().split()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return None

    def servers(self):
        nodes = sorted(p.name for p in (self.dir / "nodes").glob("node-*"))
        s3 = ["s3"] if (self.dir / "run" / "s3.pid").exists() else []
        voters = sorted(p.stem for p in (self.dir / "run").glob("meta*.pid"))
        return [*nodes, *voters, *s3]

    def kill9(self, name):
        pid = self.pid(name)
        check(pid, f"{name} has no pid")
        os.kill(pid, signal.SIGKILL)
        return pid

    def logs(self, lines=8):
        text = []
        for log in sorted((self.dir / "log").glob("*.log")):
            told = [t for t in log.read_text(errors="replace").splitlines() if " INFO " not in t]
            if told:
                text += [f"--- {log.name}", *told[-lines:]]
        return "\n".join(text)

    # -- the bucket, by a foreign tool --------------------------------------
    def s3_env(self):
        env = dict(os.environ)
        env.update(json.loads(self.ebb("env", "--json").stdout))
        return env

    def s5cmd(self, *args, ok=True, data=None):
        p = subprocess.run(["s5cmd", *map(str, args)], env={**self.s3_env(), **self.extra_env}, text=True,
                           input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        if ok and p.returncode != 0:
            raise Failure(f"s5cmd {' '.join(map(str, args))}: {p.stderr.strip()}")
        return p

    def bucket_sizes(self, bucket="ebb"):
        """key -> size, directory markers and our reserved prefix left out."""
        out = self.s5cmd("--json", "ls", f"s3://{bucket}/*", ok=False).stdout
        sizes = {}
        for line in out.splitlines():
            o = json.loads(line)
            key = o["key"].split(f"s3://{bucket}/", 1)[1]
            if o.get("type") == "directory" or key.endswith("/") or key.startswith(".ebb/"):
                continue
            sizes[key] = o.get("size", 0)
        return sizes

    # -- the end -------------------------------------------------------------
    def check_sound(self):
        """Whatever happened to a cluster that still serves, its namespace fits together, and nodes have nothing that it does not know of."""
        pid = self.pid("controller")
        with contextlib.suppress(OSError):
            if pid and os.kill(pid, 0) is None:
                p = self.ebb("--json", "fsck", ok=False)
                said = json.loads(p.stdout) if p.stdout.startswith("{") else {"error": p.stderr}
                sound = p.returncode == 0 or "no metadata server" in p.stderr
                check(sound, f"not sound: {json.dumps(said, indent=1)[:3000]} {p.stderr}")

    def destroy(self):
        """At once, and first of all the mounts' daemons: a call that waits for servers ends with them."""
        kill_all("EBB_DIR", self.dir)
        for path in list(self.mounts):
            subprocess.run(["umount", "-l", str(path)], stderr=subprocess.DEVNULL)
        self.mounts.clear()


@contextlib.contextmanager
def cluster(start=True, kind=Cluster, **up):
    """A cluster in a fresh directory on a real disk, gone afterwards."""
    base = Path(tempfile.mkdtemp(prefix="ebb-e2e-", dir=os.environ.get("EBB_E2E_DIR", "/var/tmp")))
    c = kind(base / "cluster", **up)
    try:
        if start:
            c.up()
        yield c
        c.check_sound()
    except BaseException as e:
        print(f"{e or type(e).__name__}\n{c.logs(12)}", flush=True)
        raise
    finally:
        c.destroy()
        shutil.rmtree(base, ignore_errors=True)


def processes(name, value):
    """Those with this in their environment, however they were detached."""
    found, want = [], f"{name}={value}".encode()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and want in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def kill_all(name, value):
    """The same, ended, with what they start meanwhile."""
    for _ in range(200):
        left = processes(name, value)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class Mark:
    """What a test starts is known by a word in its environment: to be looked at, and to be ended."""

    def __init__(self):
        self.base = tempfile.mkdtemp(prefix="ebb-e2e-", dir=os.environ.get("EBB_E2E_DIR", "/var/tmp"))
        self.env = {"EBB_E2E_DIR": self.base}

    def describe(self):
        """Where each thread of each process waits, what the kernel waits for, and the end of each log."""
        time.sleep(1)  # for what was asked to show its stacks
        for pid in processes("EBB_E2E_DIR", self.base):
            with contextlib.suppress(OSError):
                print(f"--- process {pid}:", Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
            for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
                with contextlib.suppress(OSError):
                    stack = [line.split("]", 1)[-1].strip() for line in (task / "stack").read_text().splitlines()]
                    print(f"    {(task / 'comm').read_text().strip()} {(task / 'stat').read_text().rsplit(')', 1)[1].split()[0]}: {' < '.join(stack[:6])}")
        for log in sorted(Path(self.base).glob("*/cluster/log/*.log")):
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-12:], sep="\n")
        sys.stdout.flush()

    def sweep(self):
        """Ends what is left. With its daemon, a mount's calls end too."""
        kill_all("EBB_E2E_DIR", self.base)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            point = line.split()[1].replace("\\040", " ")
            if point.startswith(self.base + "/"):
                subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.base, ignore_errors=True)


# -- trees -----------------------------------------------------------------

def make_tree(root, files, seed):
    """A tree as sources are: many small files, some big, links, odd names, modes, times."""
    rng = random.Random(seed)
    root = Path(root)
    root.mkdir(parents=True)
    dirs = [root]
    for i in range(max(4, files // 25)):
        parent = rng.choice(dirs)
        d = parent / rng.choice([f"dir{i}", f"with space {i}", f"ünïcode-{i}", f"d.{i}"])
        d.mkdir(exist_ok=True)
        dirs.append(d)
    for i in range(files):
        path = rng.choice(dirs) / f"f{i}{rng.choice(['', '.rs', '.txt', ' copy', '+x', '%41'])}"
        size = rng.choice([0, 1, 100, 4095, 4096, 4097, rng.randrange(20_000)])
        if i % 500 == 7:
            size = rng.randrange(1 << 20, 6 << 20)
        path.write_bytes(rng.randbytes(size))
        os.chmod(path, rng.choice([0o644, 0o600, 0o755, 0o444]))
        if i % 50 == 3:
            os.symlink(f"../{path.name}", path.parent / f"link{i}")
        when = rng.randrange(1_000_000_000, 1_700_000_000) * 10**9 + rng.randrange(10**9)
        os.utime(path, ns=(when, when))
    for d in reversed(dirs):
        when = rng.randrange(1_000_000_000, 1_700_000_000) * 10**9
        os.utime(d, ns=(when, when))
    return root


def digest(root, attributes=True):
    """relative path -> everything that must survive."""
    root = Path(root)
    seen = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        if path.is_symlink():
            what = ("link", os.readlink(path))
        elif path.is_dir():
            what = ("dir",)
        else:
            what = ("file", st.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        if attributes and not path.is_symlink():
            what += (oct(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns)
        seen[str(path.relative_to(root))] = what
    return seen


def same(a, b, what):
    if a == b:
        return
    lost = sorted(a.keys() - b.keys())[:5]
    extra = sorted(b.keys() - a.keys())[:5]
    differ = [(k, a[k], b[k]) for k in sorted(a.keys() & b.keys()) if a[k] != b[k]][:5]
    raise Failure(f"{what}: missing {lost}, extra {extra}, different {differ}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
