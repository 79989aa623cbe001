"""The network between machines loses frames: data nodes, the metadata plane and clients in namespaces of their own."""

import contextlib
import functools
import itertools
import json
import os
import random
import re
import subprocess
import threading
import time

import harness
from harness import Cluster, check, cluster, wait_for
from network import HERE, Impossible, network
from replicas import GROUPS, read_back, whole, writers

ROUNDS = int(os.environ.get("EBB_SOAK", "2"))
NODES = ["n1", "n2", "n3"]
# A lease and the drift of clocks, in seconds: nobody is served for longer by who hears nothing of the metadata plane.
LEASE, DRIFT = 3.0, 0.5


class Machines(Cluster):
    """The metadata plane (and S3) on one machine, a data node on each of some others, started as a person would."""

    def __init__(self, directory, net, **up):
        super().__init__(directory, **up)
        self.net, self.nodes, self.run = net, {}, net.hand.run

    def up(self):
        super().up(inside=self.net.inside("meta"), host=self.net.address("meta"), nodes_elsewhere=True, nodes=len(NODES))
        for name in NODES:
            self.start_node(name)
        wait_for("the nodes to hold all groups",
                 lambda: all(g["members"] for g in self.status()["map"]["pgs"]) and len(self.status()["map"]["nodes"]) == len(NODES))

    def start_node(self, name):
        identity = re.search(r'^cluster = "(\w+)"', (self.dir / "cluster.toml").read_text(), re.M)[1]
        meta = json.loads((self.dir / "run" / "endpoints.json").read_text())["meta"]
        config = self.dir / "run" / f"{name}.toml"
        config.write_text(f'dir = "{self.dir.parent / name}"\nlisten = "{self.net.address(name)}"\ncapacity_bytes = {512 << 20}\n'
                          f'cluster = "{identity}"\nkey_file = "{self.dir / "key"}"\nmeta = {json.dumps(meta)}\n'
                          f'ready_file = "{self.dir / "run" / name}.ready"\n')
        with open(self.dir / "log" / f"{name}.log", "a") as log:
            command = [*self.net.inside(name), harness.EBB, "serve", "data", "--config", str(config)]
            self.nodes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env())

    def id_of(self, name):
        return json.loads((self.dir / "run" / f"{name}.ready").read_text())["node"]

    def destroy(self):
        try:
            self.net.heal()
        finally:
            super().destroy()
            for process in self.nodes.values():
                process.kill()
                process.wait()

    # -- what the map says -----------------------------------------------------
    def groups(self):
        """The nodes of each group's members, the primary first."""
        return [[m["node"] for m in g["members"]] for g in self.status()["map"]["pgs"]]

    def cut_off(self, name):
        return [c for c in self.status()["cut_off"] if c["node"] == self.id_of(name)]


def group_of(path):
    """The placement group of a file of up to 16 MiB; part of the format (`PgId::of`)."""
    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB % 2**64
        return z ^ (z >> 31)
    return mix(mix((path.stat().st_ino + 0x9E37_79B9_7F4A_7C15) % 2**64)) % GROUPS


@contextlib.contextmanager
def machines(*more, **up):
    with network("meta", *NODES, *more) as net, cluster(kind=functools.partial(Machines, net=net), **up) as c:
        yield c, net


def in_namespaces(test):
    """Says so instead where none can be made."""
    @functools.wraps(test)
    def run():
        try:
            return test()
        except Impossible as e:
            return f"SKIPPED, no network namespaces here: {e}"
    return run


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


class Onlooker(threading.Thread):
    """Reads the start of a file over and over, past all caches of its machine, and knows what it read when."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.reads, self.error, self.stop_asked = path, [], None, threading.Event()
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def run(self):
        try:
            while not self.stop_asked.wait(0.1):
                began = time.monotonic()
                what = os.pread(self.fd, 4, 0)
                self.reads.append((began, time.monotonic(), what))
        except OSError as e:
            self.error = e
        with contextlib.suppress(OSError):
            os.close(self.fd)


def look_on(root, names):
    found = {name: Onlooker(root / name) for name in names}
    for o in found.values():
        o.start()
    wait_for("everybody to have read", lambda: all(o.reads or o.error for o in found.values()))
    return found


def look_away(found):
    for o in found.values():
        o.stop_asked.set()
    for name, o in found.items():
        o.join(90)
        check(not o.is_alive(), f"{name}: a reader hangs")
        check(not o.error, f"{name}: a read failed: {o.error!r}")
    return sum(len(o.reads) for o in found.values())


def nothing_stale(found, changed):
    """Nobody read what was before, once it was overwritten."""
    for name, at in changed.items():
        stale = [r for r in found[name].reads if r[0] > at and r[2] != b"new "]
        check(not stale, f"{name}: {stale[0][2]!r} was read {stale[0][0] - at:.2f} s after it was overwritten" if stale else "")


def served_no_longer_than_its_lease(found, names, cut, healed):
    """What the node that was cut off at `cut` gave to those who knew no other."""
    last = max((r[1] - cut for name in names for r in found[name].reads if r[1] < healed), default=0.0)
    check(last < LEASE + DRIFT, f"it served for {last:.2f} s after it was cut off")
    return last


def go_on(what, found, more=3, seconds=60):
    before = [w.writes for w in found]
    wait_for(what, lambda: any(w.error for w in found) or all(w.writes >= n + more for w, n in zip(found, before)), seconds)
    for w in found:
        check(not w.error, f"{what}: a client's call failed: {w.error!r}")


def finish(c, net, found, others=()):
    """Everything is reached again: each acked byte is there, as a client without memories sees it. What can be said of it."""
    check(not net.lost, "healed")
    for w in [*found, *others]:
        w.finish()
    fresh = c.mount("fresh")
    told = [read_back(fresh, found), read_back(fresh / "elsewhere", others)]
    files, size = (sum(column) for column in zip(*told))
    found = [*found, *others]
    check(all(p.poll() is None for p in c.nodes.values()), "the same processes all the while")
    check(c.bucket_sizes() == {} or c.up_options.get("replicas", 1) == 1, "nothing was saved by S3")
    return (f"{net.cuts} directions cut, {sum(w.writes for w in found)} fsynced writes, {sum(w.checks for w in found)} files checked "
            f"meanwhile, {files} files, {size} bytes read back, the longest stall {max(w.longest for w in found):.1f} s")


def writers_elsewhere(c, net, count, seed):
    root = c.mount("elsewhere", inside=net.inside("other")) / "elsewhere"
    root.mkdir()
    return writers(root, count, seed)


def seeded():
    seed = int(os.environ.get("EBB_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}", flush=True)
    return seed


@in_namespaces
def test_a_node_cut_off_from_the_metadata_plane_is_replaced_and_caught_up():
    """It is still reached by clients and other nodes, one of which hears nothing new either: nobody is served past the lease."""
    seed = seeded()
    with machines("other", replicas=2) as (c, net):
        m, names = c.mount(), [f"f{i}" for i in range(24)]
        for name in names:
            write(m / name, b"old " + name.encode() * 1000)
        found = writers(m, 3, seed)
        wait_for("all groups to have two members", lambda: whole(c, 3))
        lookers = look_on(c.mount("elsewhere", inside=net.inside("other")), names)
        groups, n1 = c.groups(), c.id_of("n1")
        its = [name for name in names if groups[group_of(m / name)][0] == n1]
        check(its, "it has some of the files")
        cut = time.monotonic()
        net.cut("n1", "meta")
        net.cut("other", "meta")
        wait_for("others to take its groups over", lambda: all(g[0] != n1 for g in c.groups()))
        took = time.monotonic() - cut
        changed = {}
        for name in names:
            write(m / name, b"new " + name.encode() * 1000)
            changed[name] = time.monotonic()
        go_on("everybody to write on without it", found)
        check(c.cut_off("n1"), "it is cut off still")
        healed = time.monotonic()
        net.heal()
        wait_for("the onlookers to see what is new", lambda: all(o.error or o.reads[-1][2] == b"new " for o in lookers.values()))
        wait_for("it to be a member again, and caught up", lambda: whole(c, 3) and any(n1 in g for g in c.groups()))
        back = time.monotonic() - healed
        reads = look_away(lookers)
        nothing_stale(lookers, changed)
        last = served_no_longer_than_its_lease(lookers, its, cut, healed)
        return (f"taken over after {took:.1f} s, it served for {last:.1f} s, whole again {back:.1f} s after it was reached; "
                f"{reads} reads of onlookers, {len(its)} of {len(names)} files were its own; {finish(c, net, found)}")


@in_namespaces
def test_members_that_do_not_reach_each_other_go_on_one_without_the_other():
    """Primary and backup, in both directions, then in one; both reach clients and the metadata plane."""
    seed = seeded()
    with machines(replicas=2) as (c, net):
        m = c.mount()
        found = writers(m, 3, seed)
        wait_for("all groups to have two members", lambda: whole(c, 3))
        pair = {c.id_of("n1"), c.id_of("n2")}
        said = []
        for back in [True, False]:
            check(any(set(g) == pair for g in c.groups()), "they share groups")
            cut = time.monotonic()
            net.cut("n1", "n2", back)
            go_on("everybody to write on", found)
            apart = time.monotonic() - cut
            # Also those that nobody writes to at the moment: else each would have to find out by itself, later.
            wait_for("each to go on without the other", lambda: not any(set(g) == pair for g in c.groups()))
            go_on("everybody to write on", found, 20)
            check(not c.cut_off("n1") and not c.cut_off("n2"), "both are in contact")
            healed = time.monotonic()
            net.heal()
            wait_for("all groups to have two members again", lambda: whole(c, 3))
            said.append(f"writes went on after {apart:.1f} s, whole again after {time.monotonic() - healed:.1f} s")
        return f"{'; '.join(said)}; {finish(c, net, found)}"


@in_namespaces
def test_a_client_that_does_not_reach_a_node_waits_and_others_do_not():
    """Then it does not reach the metadata plane; nothing moves for its sake."""
    seed = seeded()
    with machines("other", replicas=2) as (c, net):
        m = c.mount()
        # Their first primaries hand over to those that they belong to, for a while.
        wait_for("all groups to have two members, where they belong", lambda: whole(c, 3) and c.status()["misplaced"] == 0)
        epochs = [g["epoch"] for g in c.status()["map"]["pgs"]]
        found = writers(m, 3, seed)
        others = writers_elsewhere(c, net, 1, seed + 3)
        go_on("everybody to write", found + others)
        for far in ["n1", "meta"]:
            net.cut(HERE, far)
            wait_for(f"the writers to wait for {far}",
                     lambda: any(w.error for w in found) or all(time.monotonic() - w.since > 1.5 for w in found))
            go_on("the others to go on", others)
            net.heal()
            go_on(f"everybody to write on after {far} is reached again", found + others)
        check(epochs == [g["epoch"] for g in c.status()["map"]["pgs"]], "no group changed hands")
        return finish(c, net, found, others)


@in_namespaces
def test_what_only_a_cut_off_node_has_waits_for_it_and_nothing_old_is_served():
    """One copy: others serve what S3 has, and overwrite it; the rest is there again when the node is reached."""
    seed = seeded()
    with machines("other") as (c, net):
        m, names = c.mount(), [f"f{i}" for i in range(36)]
        for name in names:
            write(m / name, b"old " + name.encode() * 1000)
        c.ebb("flush", "/", "--wait")
        lookers = look_on(c.mount("elsewhere", inside=net.inside("other")), names)
        found = writers(m, 2, seed, 8)
        go_on("everybody to write", found, 10)
        groups, n1 = c.groups(), c.id_of("n1")
        its = [name for name in names if groups[group_of(m / name)] == [n1]]
        cut = time.monotonic()
        net.cut("n1", "meta")
        net.cut("other", "meta")

        def stood_in():
            off = c.cut_off("n1")
            return off and sum(g == [n1] for g in c.groups()) == len(off[0]["waiting"])

        wait_for("stand-ins for what S3 has", stood_in)
        groups = c.groups()
        waiting = [name for name in its if groups[group_of(m / name)] == [n1]]
        check(len(waiting) < len(its), "some of its groups have nothing that only it has")
        changed = {}
        for name in names:
            if name not in waiting:
                write(m / name, b"new " + name.encode() * 1000)
                changed[name] = time.monotonic()
        check(c.cut_off("n1"), "it is cut off still")
        healed = time.monotonic()
        net.heal()
        wait_for("the onlookers to see what is new", lambda: all(lookers[n].error or lookers[n].reads[-1][2] == b"new " for n in changed))
        for name in waiting:
            check((m / name).read_bytes() == b"old " + name.encode() * 1000, f"{name}: as it was")
            write(m / name, b"new " + name.encode() * 1000)
            changed[name] = time.monotonic()
        go_on("everybody to write on", found)
        wait_for("it to have its groups again", lambda: not c.cut_off("n1") and sum(g == [n1] for g in c.groups()) > GROUPS // 6)
        reads = look_away(lookers)
        nothing_stale(lookers, changed)
        last = served_no_longer_than_its_lease(lookers, its, cut, healed)
        said = finish(c, net, found)
        for name in names:
            check((c.mounts[-1] / name).read_bytes() == b"new " + name.encode() * 1000, name)
        c.ebb("flush", "/", "--wait")
        return (f"it served for {last:.1f} s, {len(its) - len(waiting)} of its {len(its)} files were overwritten elsewhere, "
                f"{reads} reads of onlookers; {said}")


@in_namespaces
def test_random_cuts_lose_nothing_acked():
    """Up to three cuts at a time, some in one direction, between any machines, for up to eight seconds."""
    seed = seeded()
    rng = random.Random(seed)
    with machines("other", replicas=2) as (c, net):
        found = writers(c.mount(), 2, seed)
        others = writers_elsewhere(c, net, 1, seed + 2)
        wait_for("all groups to have two members", lambda: whole(c, 3))
        links = list(itertools.combinations(net.names, 2))
        for turn in range(ROUNDS):
            cuts = [(*rng.sample(link, 2), rng.random() < 0.6) for link in rng.sample(links, rng.randrange(3) + 1)]
            for a, b, back in cuts:
                net.cut(a, b, back)
            # How long is part of what is tried.
            time.sleep(rng.uniform(1, 8))
            net.heal()
            go_on(f"round {turn}, {cuts}: everybody to write on", [*found, *others])
        began = time.monotonic()
        wait_for("all groups to have two members again", lambda: whole(c, 3), 120)
        return f"{ROUNDS} rounds, whole again after {time.monotonic() - began:.1f} s; {finish(c, net, found, others)}"
