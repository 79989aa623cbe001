"""Three voters of the metadata plane while programs work: leaders that die, restarts one after another, a disk that is gone."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time

import harness
from harness import Failure, check, cluster, wait_for
from partitions import in_namespaces, machines

ROUNDS = int(os.environ.get("EBB_SOAK", "1"))


class Load(threading.Thread):
    """What programs do with files, every call counted, every file known by its checksum once its fsync or rename returned."""

    def __init__(self, root, seed):
        super().__init__(daemon=True)
        self.root, self.rng = root / f"load{seed}", random.Random(seed)
        self.calls, self.longest, self.error = 0, 0.0, None
        self.files, self.made = {}, 0
        self.stop_asked = threading.Event()

    def call(self, what, *args):
        began = time.monotonic()
        result = what(*args)
        self.longest = max(self.longest, time.monotonic() - began)
        self.calls += 1
        return result

    def run(self):
        try:
            self.call(os.mkdir, self.root)
            while not self.stop_asked.is_set():
                self.step()
        except Exception as e:  # noqa: BLE001
            self.error = e

    def step(self):
        self.made += 1
        temporary, name = self.root / f"t{self.made}", f"f{self.rng.randrange(60)}"
        data = self.rng.randbytes(self.rng.choice([0, 10, 4096, 50_000, 400_000]))
        # O_EXCL and the directory below: what was done twice would say so.
        fd = self.call(os.open, temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            if data:
                check(self.call(os.write, fd, data) == len(data), "a short write")
            self.call(os.fsync, fd)
        finally:
            self.call(os.close, fd)
        self.call(os.rename, temporary, self.root / name)
        self.files[name] = hashlib.sha256(data).hexdigest()
        self.call(os.mkdir, self.root / "dir")
        self.call(os.rmdir, self.root / "dir")
        if self.made % 3 == 0:
            self.verify(self.rng.choice(sorted(self.files)))
        if self.made % 10 == 0:
            check(set(self.call(os.listdir, self.root)) == set(self.files), "the names are those that were made")
        if self.made % 7 == 0:
            gone = self.rng.choice(sorted(self.files))
            self.call(os.unlink, self.root / gone)
            del self.files[gone]

    def verify(self, name):
        fd = self.call(os.open, self.root / name, os.O_RDONLY)
        try:
            digest = hashlib.sha256()
            while piece := self.call(os.read, fd, 1 << 20):
                digest.update(piece)
        finally:
            self.call(os.close, fd)
        if digest.hexdigest() != self.files[name]:
            raise Failure(f"{name}: acked content is lost")


class Loads:
    def __init__(self, root, threads=3):
        self.all = [Load(root, seed) for seed in range(threads)]
        for load in self.all:
            load.start()

    def gets_on(self, seconds=60):
        """Each does something more, or says what went wrong."""
        before = [load.made for load in self.all]
        wait_for("everybody to get on", lambda: any(load.error for load in self.all)
                 or all(load.made >= b + 2 for load, b in zip(self.all, before)), seconds)
        for load in self.all:
            if load.error:
                raise Failure(f"a call failed: {load.error!r}")

    def finish(self):
        for load in self.all:
            load.stop_asked.set()
        for load in self.all:
            load.join(120)
            check(not load.is_alive(), "a call hangs")
            if load.error:
                raise Failure(f"a call failed: {load.error!r}")
        self.verify()

    def verify(self):
        for load in self.all:
            check(set(os.listdir(load.root)) == set(load.files), "the names are those that were made")
            for name in load.files:
                load.verify(name)

    def said(self):
        return f"{sum(load.calls for load in self.all)} calls, none failed, the longest {max(load.longest for load in self.all):.1f} s"


def voters(c):
    return json.loads(c.ebb("meta", "list", "--json").stdout)


def process(voter):
    return "meta" if voter["id"] == 1 else f"meta-{voter['id']}"


def leader(c):
    return next(process(v) for v in voters(c) if v["role"] == "leader")


def complete(c, n=3):
    """All vote, are heard, and have what the leader has."""
    def look():
        all_ = voters(c)
        return len(all_) == n and all(v["role"] != "learner" and v["heard_ms"] is not None and v["heard_ms"] < 1000
                                      and v["lag"] is not None and v["lag"] < 50 for v in all_)
    wait_for("all voters to be there", look, 60)


def at_rest(c, m, loads):
    """Everything gets to the bucket, and is there after a start from the bucket alone."""
    c.ebb("flush", "/", "--wait")
    loads.verify()
    c.down()
    c.up()
    root = c.mount()
    for load in loads.all:
        load.root = root / load.root.name
    loads.verify()


def test_kill9_and_pauses_of_the_leader_fail_no_call():
    """Leaders die or stand still, one after another: calls wait for the next leader, none fails, nothing acked is lost."""
    with cluster(meta=3, flush_after=1000) as c:
        m = c.mount()
        loads = Loads(m)
        kills = pauses = 0
        for n in range(6 * ROUNDS):
            loads.gets_on()
            name = leader(c)
            old = c.pid(name)
            if n % 3 == 2:
                os.kill(old, signal.SIGSTOP)
                pauses += 1
                try:
                    loads.gets_on()
                    check(leader(c) != name, "another leads")
                finally:
                    os.kill(old, signal.SIGCONT)
            else:
                c.kill9(name)
                kills += 1
                wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
            complete(c)
        loads.gets_on()
        loads.finish()
        said = loads.said()
        at_rest(c, m, loads)
        return f"{kills} kills and {pauses} pauses of leaders, {said}"


def test_a_rolling_restart_of_three_voters_fails_no_call():
    """Each voter is stopped in order and comes back, twice around, followers and leaders alike."""
    with cluster(meta=3, flush_after=1000) as c:
        loads = Loads(c.mount())
        restarts = 0
        for _ in range(2 * ROUNDS):
            for name in ["meta", "meta-2", "meta-3"]:
                loads.gets_on()
                old = c.pid(name)
                os.kill(old, signal.SIGTERM)
                wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
                restarts += 1
                complete(c)
        loads.gets_on()
        loads.finish()
        return f"{restarts} restarts, {loads.said()}"


def test_a_voter_whose_disk_is_gone_is_replaced():
    """A wiped directory is refused; another voter takes its place, and with it the loss of one more harms nobody."""
    with cluster(meta=3, flush_after=600000) as c:
        loads = Loads(c.mount())
        loads.gets_on()
        lost = next(v for v in voters(c) if v["role"] == "follower")
        name = process(lost)
        # Its disk goes under it: what the process still has open is of no use to its successor.
        shutil.rmtree(c.dir / name, ignore_errors=True)
        c.kill9(name)
        wait_for("it to be refused", lambda: (c.dir / "run" / f"{name}.failed").exists(), 30)
        check(f"ebb meta replace {lost['id']}" in (c.dir / "run" / f"{name}.failed").read_text(), "it says what to do")
        loads.gets_on()
        c.ebb("meta", "replace", lost["id"])
        check([v["id"] for v in voters(c)] == [i for i in (1, 2, 3) if i != lost["id"]] + [4], "the fourth in its place")
        complete(c)
        check(not c.pid(name) or wait_for("it to be stopped", lambda: not c.pid(name), 10), "no process of it is left")
        wait_for("its directory to be gone", lambda: not (c.dir / name).exists(), 10)
        # Only with the new one there is a majority when the leader goes.
        loads.gets_on()
        gone = leader(c)
        c.kill9("controller")
        c.kill9(gone)
        loads.gets_on()
        loads.finish()
        said = loads.said()
        c.up()
        complete(c)
        at_rest(c, None, loads)
        return said


def test_one_voter_becomes_three_and_five_and_one():
    """Voters come and go under load; a mount that was told of the first alone follows."""
    with cluster(flush_after=1000) as c:
        loads = Loads(c.mount(), threads=2)
        loads.gets_on()
        for n in range(2, 6):
            c.ebb("meta", "add")
            complete(c, n)
            loads.gets_on()
        for n in range(4, 0, -1):
            c.ebb("meta", "remove", voters(c)[0]["id"])
            complete(c, n)
            loads.gets_on()
        check(voters(c)[0]["id"] == 5, "the last that came is left")
        loads.finish()
        said = loads.said()
        at_rest(c, None, loads)
        return said


@contextlib.contextmanager
def voter_elsewhere(c, net, number):
    """A server on a machine of its own, started as a person would, and taken into the group."""
    name = f"v{number}"
    address, ready = f"{net.address(name)}:7700", c.dir / "run" / f"{name}.ready"
    text = (c.dir / "run" / "meta.toml").read_text()
    for key, value in [("dir", f'"{c.dir.parent / name}"'), ("listen", f'"{address}"'), ("node_id", number), ("join", "true"),
                       ("ready_file", f'"{ready}"')]:
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, count=1, flags=re.M)
        check(found, f"{key} in the configuration")
    config = c.dir / "run" / f"{name}.toml"
    config.write_text(text)
    with open(c.dir / "log" / f"{name}.log", "a") as log:
        command = [*net.inside(name), harness.EBB, "serve", "meta", "--config", str(config)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=c.env())
    try:
        wait_for(f"{name} to be ready", ready.exists, 30)
        c.ebb("meta", "add", "--id", number, "--address", address)
        yield server
    finally:
        server.kill()
        server.wait()


@in_namespaces
def test_a_leader_that_its_voters_do_not_hear_serves_nobody():
    """Clients and nodes reach everybody, the leader and the other voters don't reach each other; then only its words are lost."""
    with machines("v2", "v3") as (c, net), voter_elsewhere(c, net, 2), voter_elsewhere(c, net, 3):
        loads = Loads(c.mount())
        loads.gets_on()
        took = []
        for back in [True, False]:
            first = leader(c)
            at = {"meta": "meta", "meta-2": "v2", "meta-3": "v3"}
            others = [at[process(v)] for v in voters(c) if process(v) != first]
            cut = time.monotonic()
            for other in others:
                net.cut(at[first], other, back)
            wait_for("another to lead", lambda: leader(c) != first, 60)
            took.append(time.monotonic() - cut)
            loads.gets_on()
            net.heal()
            complete(c)
            loads.gets_on()
        loads.finish()
        c.ebb("flush", "/", "--wait")
        loads.verify()
        return f"another led after {', '.join(f'{t:.1f} s' for t in took)}; {loads.said()}"
