"""Extended attributes through mounts, and wherever a file goes: S3, zero, a dump, a new cluster (docs/SEMANTICS.md)."""

import errno
import json
import os
import shutil
import subprocess
import time

from harness import check, cluster, same, wait_for

BINARY = bytes(range(256))
# What the attributes of a file may take as the text that is in its object's metadata.
ROOM = 1500


def number(call, *args, **kw):
    """The errno of a call; 0 if it succeeds."""
    try:
        call(*args, **kw)
    except OSError as e:
        return e.errno
    return 0


def all_of(path):
    """Everything that a path has, symbolic links themselves."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def tree(root):
    """Extended attributes of everything below, and modes, by path."""
    found = {}
    for top, dirs, files in os.walk(root):
        for path in [top] + [os.path.join(top, n) for n in files + dirs]:
            mode = os.lstat(path).st_mode
            found[os.path.relpath(path, root)] = (mode, all_of(path))
    return found


def fill(root):
    """A small tree in which most things have some."""
    (root / "d" / "empty").mkdir(parents=True)
    (root / "d" / "f").write_bytes(b"data" * 1000)
    (root / "none").write_bytes(b"x")
    os.symlink("d/f", root / "l")
    os.setxattr(root / "d", "user.dir", b"of a directory")
    os.setxattr(root / "d" / "empty", b"user.\xff name, with=all:of%it", BINARY)
    os.setxattr(root / "d" / "f", "user.text", "plain, nearly: ä".encode())
    os.setxattr(root / "d" / "f", "user.nothing", b"")
    os.setxattr(root / "d" / "f", "trusted.t", b"\0")
    os.setxattr(root / "l", "trusted.of-a-link", b"1", follow_symlinks=False)


def test_calls_answer_as_linux_says():
    with cluster() as c:
        m = c.mount()
        f = m / "f"
        f.write_bytes(b"data")
        before = os.stat(f)
        check(os.listxattr(f) == [], "none")
        check(number(os.getxattr, f, "user.a") == errno.ENODATA, "ENODATA of get")
        check(number(os.removexattr, f, "user.a") == errno.ENODATA, "ENODATA of remove")
        check(number(os.setxattr, f, "user.a", b"1", os.XATTR_REPLACE) == errno.ENODATA, "XATTR_REPLACE of none")
        os.setxattr(f, "user.a", BINARY, os.XATTR_CREATE)
        check(number(os.setxattr, f, "user.a", b"1", os.XATTR_CREATE) == errno.EEXIST, "XATTR_CREATE of one")
        check(os.getxattr(f, "user.a") == BINARY, "every byte is kept")
        os.setxattr(f, "user.a", b"", os.XATTR_REPLACE)
        check(all_of(f) == {"user.a": b""}, "an empty value")
        check(os.stat(f).st_ctime_ns > before.st_ctime_ns and os.stat(f).st_mtime_ns == before.st_mtime_ns, "the ctime tells")
        check(number(os.setxattr, f, "user." + "n" * 251, b"") == errno.ERANGE, "a name of 256 bytes")
        check(number(os.setxattr, f, "user.a", b"1" * 65537) == errno.E2BIG, "a value of more than 64 KiB")
        check(number(os.setxattr, f, "user.a", os.urandom(4096)) == errno.ENOSPC, "more than an object's metadata has room for")
        check(number(os.setxattr, f, "nonsense", b"") == errno.EOPNOTSUPP, "a name without a name space")
        check(number(os.setxattr, f, "system.posix_acl_access", b"\2\0\0\0") in (errno.EOPNOTSUPP, errno.EINVAL), "no ACLs")
        check(number(os.getxattr, f, "system.posix_acl_access") in (errno.EOPNOTSUPP, errno.ENODATA), "none there")
        check(all_of(f) == {"user.a": b""}, "what is refused changes nothing")
        room = ROOM - len("user.a=,user.b=")
        os.setxattr(f, "user.b", b"b" * room)
        check(number(os.setxattr, f, "user.b", b"b" * (room + 1)) == errno.ENOSPC, "full to the last byte")
        # A probe for the size, and a buffer that is too short.
        probe = "import ctypes, sys; b = ctypes.create_string_buffer(9); g = ctypes.CDLL(None, use_errno=True).getxattr\n" \
                "p = sys.argv[1].encode(); sizes = [g(p, b'user.b', None, 0), g(p, b'user.b', b, 9), ctypes.get_errno()]; print(*sizes)"
        said = subprocess.run(["python3", "-c", probe, f], text=True, stdout=subprocess.PIPE, check=True).stdout.split()
        check(said == [str(room), "-1", str(errno.ERANGE)], f"sizes: {said}")
        os.removexattr(f, "user.b")
        # While it is open and written, and after it was unlinked.
        with f.open("r+b") as open_file:
            open_file.write(b"more")
            os.setxattr(open_file.fileno(), "user.a", b"fd")
            f.unlink()
            check(os.getxattr(open_file.fileno(), "user.a") == b"fd", "an unlinked file keeps them")
        os.symlink("f", m / "l")
        check(number(os.setxattr, m / "l", "user.a", b"", follow_symlinks=False) == errno.EPERM, "no user. on links")
        # Others than root: by the file's mode, and no trusted. in lists.
        f.write_bytes(b"mine")
        os.setxattr(f, "trusted.secret", b"1")
        os.setxattr(f, "user.shown", b"1")
        other = "import os, sys\nos.setuid(4711)\nnames = os.listxattr(sys.argv[1])\ntry: os.setxattr(sys.argv[1], 'user.x', b'')\nexcept PermissionError: names.append('EACCES')\nprint(*names)"
        said = subprocess.run(["python3", "-c", other, f.name], cwd=m, text=True, stdout=subprocess.PIPE, check=True).stdout.split()
        check(said == ["user.shown", "EACCES"], f"another user: {said}")


def test_they_go_wherever_a_file_goes():
    """To S3 and to zero, through a restart, a dump, and a new cluster that has nothing but the bucket."""
    with cluster() as c:
        m = c.mount()
        fill(m)
        # A file is renamed, and later a directory with all in it.
        os.rename(m / "none", m / "named")
        os.setxattr(m / "named", "user.late", b"after the rename")
        want = tree(m)
        check(len([1 for _, xattrs in want.values() if xattrs]) == 5, f"five have some: {want}")
        other = c.mount("other")
        same(want, tree(other), "another mount sees them")
        c.ebb("flush", "/", "--wait")
        os.rename(m / "d", m / "moved")
        want = tree(m)
        c.ebb("flush", "/", "--wait")
        c.ebb("scale", 0, "--wait")
        c.ebb("scale", 2, "--wait")
        same(want, tree(m), "after scale 0 and 2")
        # Removed from one, changed on one; not flushed by hand.
        os.removexattr(m / "moved" / "f", "user.text")
        os.setxattr(m / "moved", "user.dir", b"another")
        want = tree(m)
        dump = c.dir.parent / "names.dump"
        c.ebb("meta", "dump", dump)
        records = [json.loads(line) for line in dump.read_text().splitlines()]
        said = {r["path"]: r["xattrs"] for r in records if r.get("xattrs")}
        check(said["moved"] == "user.dir=another" and len(said) == 5, f"the dump: {said}")
        killed = c.kill9("meta")
        wait_for("the metadata server to be back", lambda: c.pid("meta") not in (None, killed), 30)
        same(want, tree(m), "after the metadata server was killed")
        c.down()
        for entry in c.dir.iterdir():
            if entry.name != "s3":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        c.up()
        m = c.mount()
        same(want, tree(m), "after everything but the bucket was wiped")
        return f"{len(want)} entries"


def test_a_dump_brings_them_back():
    with cluster() as c:
        m = c.mount()
        fill(m)
        c.ebb("flush", "/", "--wait")
        os.setxattr(m / "none", "user.dirty", b"not in S3")
        want = tree(m)
        dump = c.dir.parent / "names.dump"
        c.ebb("meta", "dump", dump)
        c.umount_all()
        c.ebb("down")
        for entry in c.dir.iterdir():
            if entry.name != "s3":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        c.up()
        c.ebb("meta", "load", dump)
        same(want, tree(c.mount()), "after the load")


def test_copies_keep_them():
    """cp -a and rsync -X, in and out; a mount that remembers sees changes at once."""
    with cluster() as c:
        m, strict = c.mount(), c.mount("strict", "-o", "strict")
        (m / "a").mkdir()
        fill(m / "a")
        want = tree(m / "a")
        subprocess.run(["cp", "-a", m / "a", m / "b"], check=True)
        same(want, tree(m / "b"), "cp -a within the mount")
        tools = ["cp -a"]
        if shutil.which("rsync"):
            subprocess.run(["rsync", "-aX", f"{m}/a/", f"{m}/c/"], check=True)
            same(want, tree(m / "c"), "rsync -X within the mount")
            tools.append("rsync -X")
        for n in range(20):
            os.setxattr(m / "a" / "none", "user.n", b"%d" % n)
            check(os.getxattr(strict / "a" / "none", "user.n") == b"%d" % n, "a strict mount sees it at once")
            os.removexattr(strict / "a" / "none", "user.n")
            check(os.listxattr(strict / "a" / "none") == [], "its own change")
        # Whoever was told that there are none hears of one a second later, or with an open.
        for name, look in (("opened", lambda path: path.open("rb").close()), ("waited", lambda path: time.sleep(1.1))):
            (strict / name).write_bytes(b"")
            check(os.listxattr(m / name) == [], "none")
            os.setxattr(strict / name, "user.n", b"")
            look(m / name)
            check(os.listxattr(m / name) == ["user.n"], f"seen by who {name}")
        return ", ".join(tools)
