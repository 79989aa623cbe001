"""kill -9 of every server process while a client writes, fsyncs and checks."""

import hashlib
import os
import random
import threading

from harness import Failure, check, cluster, wait_for

ROUNDS = int(os.environ.get("EBB_SOAK", "1"))


class Writer(threading.Thread):
    """Writes files, fsyncs, remembers what was acked, reads some of it back."""

    def __init__(self, root, seed, names=40):
        super().__init__(daemon=True)
        self.root, self.rng, self.names = root, random.Random(seed), names
        self.acked, self.error, self.writes = {}, None, 0
        self.stop_asked = threading.Event()

    def run(self):
        try:
            while not self.stop_asked.is_set():
                self.step()
        except Exception as e:  # noqa: BLE001
            self.error = e

    def step(self):
        name = f"f{self.rng.randrange(self.names)}"
        path = self.root / name
        data = self.rng.randbytes(self.rng.choice([10, 4096, 50_000, 1_500_000]))
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        try:
            # From here on the old content is given up, the new one not yet promised.
            self.acked.pop(name, None)
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        self.acked[name] = hashlib.sha256(data).hexdigest()
        self.writes += 1
        if self.writes % 5 == 0:
            self.verify(self.rng.choice(sorted(self.acked)))

    def verify(self, name):
        got = hashlib.sha256((self.root / name).read_bytes()).hexdigest()
        if got != self.acked[name]:
            raise Failure(f"{name}: acked content is lost")

    def finish(self):
        self.stop_asked.set()
        self.join(120)
        check(not self.is_alive(), "the writer hangs")
        if self.error:
            raise self.error


def test_kill9_of_each_server_loses_nothing_acked():
    """Each server process in turn; the controller brings it back by itself."""
    with cluster(flush_after=2000) as c:
        m = c.mount()
        (m / "w").mkdir()
        writer = Writer(m / "w", seed=7)
        writer.start()
        kills = 0
        for _ in range(ROUNDS):
            for name in c.servers():
                before = writer.writes
                wait_for("the writer to get on", lambda: writer.error or writer.writes >= before + 3, 60)
                old = c.kill9(name)
                kills += 1
                wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
                after = writer.writes
                wait_for("the writer to go on", lambda: writer.error or writer.writes > after, 90)
                if writer.error:
                    break
        writer.finish()
        for name in sorted(writer.acked):
            writer.verify(name)
        c.ebb("flush", "/", "--wait")
        c.down()
        c.up()
        writer.root = c.mount() / "w"
        for name in sorted(writer.acked):
            writer.verify(name)
        return f"{kills} kills, {writer.writes} acked writes, none lost"


def test_a_killed_controller_is_taken_over():
    """The controller dies; the servers go on; `ebb up` takes them over."""
    with cluster() as c:
        m = c.mount()
        (m / "f").write_text("before")
        pids = {n: c.pid(n) for n in c.servers()}
        c.kill9("controller")
        (m / "f").write_text("without a controller")
        c.up()
        check({n: c.pid(n) for n in c.servers()} == pids, "the same servers")
        check((m / "f").read_text() == "without a controller", "and the same data")
        old = c.kill9("node-1")
        wait_for("the new controller to restart a node", lambda: c.pid("node-1") not in (None, old), 30)
        wait_for("reads to work", lambda: (m / "f").read_text() == "without a controller", 30)


def test_everything_killed_at_once_keeps_what_was_fsynced():
    """A power cut, as far as processes go."""
    with cluster() as c:
        m = c.mount()
        for i in range(20):
            with open(m / f"f{i}", "wb") as f:
                f.write(bytes([i]) * (i * 10_000))
                f.flush()
                os.fsync(f.fileno())
        c.kill9("controller")
        for name in c.servers():
            c.kill9(name)
        c.up()
        for i in range(20):
            wait_for(f"f{i}", lambda: (m / f"f{i}").read_bytes() == bytes([i]) * (i * 10_000), 60)
