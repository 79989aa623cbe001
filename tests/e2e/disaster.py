"""When metadata is lost or damaged: dumps, loads, and the check of the namespace."""

import json
import os
import shutil
import subprocess

import harness
from harness import check, cluster, digest, wait_for


def attributes(root):
    """Everything of each entry but what a directory's own changes make of it."""
    found = {}
    for directory, dirs, files in os.walk(root):
        for name in dirs + files:
            path = os.path.join(directory, name)
            s = os.lstat(path)
            link = os.readlink(path) if os.path.islink(path) else None
            size = None if os.path.isdir(path) else s.st_size
            found[os.path.relpath(path, root)] = (oct(s.st_mode), s.st_uid, s.st_gid, size, s.st_mtime_ns, link)
    return found


def only_the_bucket_is_left(c):
    """All servers die, and all that they had."""
    for path in list(c.mounts):
        c.umount(path)
    c.kill9("controller")
    for name in c.servers():
        if name != "s3":
            c.kill9(name)
    c.kill9("s3")
    for entry in c.dir.iterdir():
        if entry.name != "s3":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def refused(c, words, *args):
    p = c.ebb(*args, ok=False)
    check(p.returncode != 0 and words in p.stderr, f"{args}: exit {p.returncode}, {p.stderr!r}, not {words!r}")


def test_a_dump_brings_names_back_when_all_servers_are_lost():
    """Names, attributes, links and empty directories are as they were dumped, stored or not; bytes come from the bucket or are said to be lost; what changed there since is noticed."""
    with cluster(meta=3) as c:
        m = c.mount()
        dump, text = c.dir.parent / "names.dump", b"some text\n" * 500
        (m / "a" / "b").mkdir(parents=True)
        for n in range(1200):
            (m / "a" / f"f{n}").write_bytes(b"%d" % n)
        for name in ["kept", "renamed", "changed", "replaced", "removed", "truncated"]:
            (m / name).write_bytes(text)
        c.ebb("flush", "/", "--wait")
        # Not in the bucket: a name, an owner, a mode, a link, directories; and bytes.
        (m / "renamed").rename(m / "a" / "b" / "new name")
        (m / "a").rename(m / "moved")
        os.chmod(m / "kept", 0o4711)
        os.chown(m / "kept", 12, 34)
        os.symlink("../nowhere\u00e9", m / "link")
        (m / "empty" / "er").mkdir(parents=True)
        (m / "changed").write_bytes(b"never stored")
        (m / "new").write_bytes(b"never stored either")
        before, content = attributes(m), digest(m)
        c.ebb("fsck")
        p = c.ebb("--json", "meta", "dump", dump)
        told = json.loads(p.stdout)
        check(told["unstored"] == 2, f"two files are not all in the bucket: {told}")
        refused(c, "is there already", "meta", "dump", dump)
        # After the dump: what is stored from here on isn't in it, and is found in the bucket.
        (m / "later").write_bytes(b"later")
        c.ebb("flush", "/later", "--wait")
        c.s5cmd("pipe", "s3://ebb/replaced", data="by a stranger")
        c.s5cmd("rm", "s3://ebb/removed")
        refused(c, "names already", "meta", "load", dump, "--give-up-unstored")
        only_the_bucket_is_left(c)
        c.up(steal_bucket=True)
        lines = dump.read_bytes().splitlines(keepends=True)
        bad = c.dir.parent / "bad.dump"
        for broken, words in [(lines[:-1], "not whole"), (lines[:5] + lines[6:], "checksum"), (lines[5:], "does not begin"),
                              ([lines[0].replace(b'"ebb_dump":1', b'"ebb_dump":9')] + lines[1:], "version 9")]:
            bad.write_bytes(b"".join(broken))
            refused(c, words, "meta", "load", bad, "--give-up-unstored")
        refused(c, "--give-up-unstored", "meta", "load", dump)
        told = json.loads(c.ebb("--json", "meta", "load", dump, "--give-up-unstored").stdout)
        check((told["reverted"], told["lost"]) == (1, 1), f"{told}")
        c.ebb("fsck")
        m = c.mount()
        after = attributes(m)
        for name in ["replaced", "removed", "later", "changed", "new"]:
            before.pop(name, None)
        differs = {k: (before.get(k), after.get(k)) for k in before if before[k] != after.get(k)}
        check(not differs, f"as they were: {differs}")
        now = digest(m / "moved")
        check(now == digest_of(content, "moved"), "bytes are those of the bucket")
        check((m / "changed").read_bytes() == text, "what was stored last")
        try:
            (m / "new").read_bytes()
            check(False, "it is lost, and says so")
        except OSError as e:
            check(e.errno == 5, f"{e}")
        check((m / "replaced").read_bytes() == b"by a stranger", "the bucket has another object by now")
        wait_for("a name that the dump does not have", lambda: "later" in os.listdir(m), 30)
        check((m / "later").read_bytes() == b"later", "found in the bucket")
        check(not (m / "removed").exists() or not readable(m / "removed"), "its object is gone")
        (m / "new").unlink()
        c.ebb("flush", "/", "--wait")

        def moved():
            keys = c.bucket_sizes()
            old = [k for k in keys if k == "renamed" or k.startswith("a/")]
            return "moved/b/new name" in keys and len(keys) >= 1205 and not old
        wait_for("the objects to be where the names are", moved, 30)
        c.down()
        return f"{len(before)} names as before"


def digest_of(content, directory):
    return {k.removeprefix(f"{directory}/"): v for k, v in content.items() if k.startswith(f"{directory}/")}


def readable(path):
    try:
        path.read_bytes()
        return True
    except OSError:
        return False


def crc32c(data):
    """As FORMAT.md has it; the standard library has another polynomial only."""
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def test_a_load_that_is_killed_goes_on():
    """The metadata server and the loader die in the middle: nobody sees half a namespace, and the same command ends it."""
    names = 30_000
    with cluster() as c:
        # Links need no object; their number makes the load long enough to be met in the middle.
        root = {"path": "", "kind": "directory", "mode": 0o755, "size": 0, "atime": 0, "mtime": 0, "ctime": 0, "listed": True}
        link = {**root, "kind": "symlink", "size": 1, "target": [120], "dirty": True, "listed": False}
        lines = [{"ebb_dump": 1, "cluster": "made up", "taken_ns": 0, "records": names}, root]
        lines += [{**link, "path": f"l{n}"} for n in range(names)]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        end = {"end": names + 1, "unstored": 0, "crc32c": crc32c(text)}
        dump = c.dir.parent / "names.dump"
        dump.write_bytes(text + json.dumps(end).encode() + b"\n")
        load = subprocess.Popen([harness.EBB, "meta", "load", dump], env=c.env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def inodes():
            return c.status()["inodes"]
        wait_for("some of it to be there", lambda: inodes() > 1 or load.poll() is not None, 60, pause=0)
        load.kill()
        load.wait()
        old = c.kill9("meta")
        wait_for("meta to be back", lambda: c.pid("meta") not in (None, old), 30)
        had = inodes()
        check(1 < had <= names, f"met in the middle: {had}")
        p = c.ebb("mount", c.dir.parent / "early", ok=False)
        check(p.returncode != 0, "nobody sees half of it")
        c.ebb("meta", "load", dump)
        check(inodes() == names + 1, f"{inodes()} inodes")
        m = c.mount()
        check(len(os.listdir(m)) == names, "all names")
        return f"{had} inodes were loaded before"
