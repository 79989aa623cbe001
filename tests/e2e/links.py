"""Files with several names through real mounts and the bucket (docs/PROTOCOL.md, R58)."""

import errno
import json
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from harness import check, cluster, wait_for
from semantics import expect
from voters import complete, leader


def names(root):
    """What is there: by path its content, its number of names, and the first path of the same file."""
    found, first = {}, {}
    for path in sorted(Path(root).rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        s = path.lstat()
        at = str(path.relative_to(root))
        body = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        found[at] = (body, s.st_nlink, first.setdefault(s.st_ino, at))
    return found


def in_bucket(c, root):
    """Each name's object holds its content."""
    want = {path: len(body) for path, (body, _, _) in names(root).items()}
    check(c.bucket_sizes() == want, f"{c.bucket_sizes()} instead of {want}")
    for path, (body, _, _) in list(names(root).items())[:20]:
        got = subprocess.run(["s5cmd", "cat", f"s3://ebb/{path}"], env=c.s3_env(), stdout=subprocess.PIPE, check=True)
        check(got.stdout == body, f"{path} in the bucket")


def test_names_share_a_file_on_all_mounts():
    with cluster() as c:
        a, b = c.mount("a"), c.mount("b", "-o", "strict")
        (a / "d").mkdir()
        (a / "f").write_text("one")
        os.link(a / "f", a / "d/g")
        check((b / "d/g").read_text() == "one" and os.stat(b / "f").st_nlink == 2, "the other mount sees both names")
        check(os.path.samefile(b / "f", b / "d/g"), "of one file")
        with open(b / "d/g", "a") as f:
            f.write(" two")
        check((a / "f").read_text() == "one two", "what is written to one is in the other")
        os.link(b / "d/g", b / "h")
        check([os.stat(a / n).st_nlink for n in ("f", "d/g", "h")] == [3] * 3, "three names")
        os.unlink(a / "f")
        check([os.stat(b / n).st_nlink for n in ("d/g", "h")] == [2] * 2, "two names")
        fd = os.open(b / "h", os.O_RDWR)
        os.unlink(a / "h")
        os.unlink(a / "d/g")
        check(os.pread(fd, 10, 0) == b"one two", "an open file outlives its last name")
        os.close(fd)
        expect(errno.EPERM, lambda: os.link(a / "d", a / "e"), "a directory's other name")
        (a / "x").write_text("x")
        expect(errno.EEXIST, lambda: os.link(a / "x", a / "d"), "a name that is taken")
        expect(errno.ENOENT, lambda: os.link(a / "none", a / "y"), "another name of nothing")
        expect(errno.ENAMETOOLONG, lambda: os.link(a / "x", a / ("n" * 256)), "256 bytes of name")
        expect(errno.EXDEV, lambda: os.link(a / "x", c.dir / "y"), "on another file system")
        os.symlink("x", a / "s")
        os.link(a / "s", a / "t", follow_symlinks=False)
        check(os.readlink(a / "t") == "x" and os.lstat(b / "s").st_nlink == 2, "symbolic links have other names, too")
        # The lock of NFS: whose link it is has it.
        (a / "mine").write_text("")
        os.link(a / "mine", a / "lock")
        (b / "theirs").write_text("")
        expect(errno.EEXIST, lambda: os.link(b / "theirs", b / "lock"), "somebody has it")
        os.rename(a / "mine", a / "lock")
        check((a / "mine").exists(), "a rename to another name of the same file does nothing")
        c.ebb("flush", "/", "--wait")
        in_bucket(c, b)


def test_names_survive_the_bucket():
    """All names are objects that any tool can read; down to the bucket and up again they are one file."""
    with cluster() as c:
        m = c.mount()
        body = os.urandom(3_000_000)
        (m / "d").mkdir()
        (m / "big").write_bytes(body)
        os.link(m / "big", m / "d/same")
        c.ebb("flush", "/big", "--wait")
        check(c.bucket_sizes() == {"big": len(body), "d/same": len(body)}, "a flush of one name stores all")
        os.chmod(m / "d/same", 0o640)
        with open(m / "big", "r+b") as f:
            f.write(b"changed")
        os.rename(m / "d", m / "e")
        was = names(m)
        c.down()
        c.up()
        m = c.mount()
        check(names(m) == was and os.stat(m / "big").st_mode & 0o777 == 0o640, "as it was")
        in_bucket(c, m)
        # Somebody copies one of the objects, and removes the other, with another tool: a copy is a file of its own,
        # and that name goes.
        c.s5cmd("cp", "s3://ebb/e/same", "s3://ebb/copy")
        c.s5cmd("rm", "s3://ebb/big")
        wait_for("the names to change", lambda: sorted(os.listdir(m)) == ["copy", "e"], 20)
        check((m / "e/same").read_bytes() == was["big"][0], "the data is the other name's")
        check([os.stat(m / n).st_nlink for n in ("e/same", "copy")] == [1, 1], "which is the only one")
        os.link(m / "copy", m / "e/other")
        c.ebb("flush", "/", "--wait")
        # Nobody here looks any more.
        c.s5cmd("cp", "s3://ebb/e/*", "s3://ebb/backup/")
        c.s5cmd("pipe", "s3://ebb/copy", data="replaced")
        c.down()
        c.up()
        m = c.mount()
        check((m / "e/same").read_bytes() == was["big"][0], "and stays it")
        links = {k: v[1] for k, v in names(m).items()}
        check(links == dict.fromkeys(["backup/other", "backup/same", "copy", "e/other", "e/same"], 1), f"all their own: {links}")


def test_programs_that_link():
    """git, cp -al, tar and rsync, whose trees are the same with them on a local disk."""
    with cluster() as c:
        m = c.mount()
        for root in (m, local := Path(tempfile.mkdtemp(dir=c.dir.parent))):
            def run(*args, at=root):
                env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(c.dir)}
                p = subprocess.run(args, cwd=at, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                check(p.returncode == 0, f"{' '.join(map(str, args))}: {p.stdout}")
            (root / "src/deep").mkdir(parents=True)
            for i in range(40):
                (root / f"src/deep/f{i}").write_text(f"file {i}\n" * i)
            run("cp", "-al", "src", "copy")
            run("ln", "src/deep/f3", "third")
            run("tar", "cf", "t.tar", "src", "third")
            (root / "out").mkdir()
            run("tar", "xf", "t.tar", "-C", "out")
            (root / "t.tar").unlink()
            if shutil.which("rsync"):
                run("rsync", "-aH", "src", "third", "synced/")
                run("rsync", "-a", f"--link-dest={root}/synced", "synced/", "again/")
            if shutil.which("git"):
                run("git", "init", "-q", "src")
                run("git", "-c", "user.name=n", "-c", "user.email=e", "-C", "src", "add", ".")
                run("git", "-c", "user.name=n", "-c", "user.email=e", "-C", "src", "commit", "-q", "-m", "x")
                run("git", "clone", "-q", "src", "clone")
                run("git", "-C", "clone", "fsck", "--strict")
                objects = list((root / "clone/.git/objects").rglob("??/*"))
                check(objects and all(o.stat().st_nlink == 2 for o in objects), "git's objects are linked, not copied")
        def plain(root):
            return {k: v for k, v in names(root).items() if ".git/" not in k}
        ours, theirs = plain(m), plain(local)
        check(ours == theirs, f"{ {k: (v[1:], theirs.get(k, (0, 0))[1:]) for k, v in ours.items() if v != theirs.get(k)} }")
        c.ebb("flush", "/", "--wait")
        in_bucket(c, m)
        return f"{len(ours)} names of {len({v[2] for v in ours.values()})} files"


def test_random_operations_match_a_local_disk():
    """The same calls here, by two mounts in turn, and on a local disk, while leaders and nodes die: same files under
    the same names, in the bucket as well."""
    seed = int(os.environ.get("EBB_SEED", random.randrange(1 << 30)))
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    done = dict.fromkeys(("link", "unlink", "rename", "write", "flush", "kill"), 0)
    with cluster(meta=3, flush_after=500) as c:
        mounts = [c.mount("a", "-o", "strict"), c.mount("b", "-o", "strict")]
        local = Path(tempfile.mkdtemp(dir=c.dir.parent))
        places = [f"{d}{n}" for d in ("", "p/", "q/") for n in "abcdef"]
        for root in (mounts[0], local):
            (root / "p").mkdir()
            (root / "q").mkdir()

        def both(call):
            answers = []
            for root in (rng.choice(mounts), local):
                try:
                    answers.append(call(root))
                except OSError as e:
                    answers.append(errno.errorcode[e.errno])
            check(answers[0] == answers[1], f"seed {seed}: {answers}")
            return answers[0]

        def write(root, at, how, body):
            with open(root / at, how) as f:
                f.write(body)

        for step in range(600):
            x, y = rng.choice(places), rng.choice(places)
            kind = rng.choices(list(done), [5, 3, 3, 4, 0.3, 0.05])[0]
            if kind == "link":
                said = both(lambda root: os.link(root / x, root / y))
            elif kind == "unlink":
                said = both(lambda root: os.unlink(root / x))
            elif kind == "rename":
                said = both(lambda root: os.rename(root / x, root / y))
            elif kind == "write":
                how, body = rng.choice(["wb", "ab", "xb"]), rng.randbytes(rng.choice([0, 10, 5000, 70_000]))
                said = both(lambda root: write(root, x, how, body))
            elif kind == "flush":
                said = c.ebb("flush", "/", "--wait") and None
            else:
                name = rng.choice([leader(c), "node-1", "node-2"]) if step else leader(c)
                old = c.kill9(name) if c.pid(name) else None
                wait_for(f"{name} to be back", lambda: c.pid(name) not in (None, old), 30)
                complete(c)
                said = None
            done[kind] += said is None
            if step % 100 == 99:
                for m in mounts:
                    check(names(m) == names(local), f"seed {seed}, step {step}")
        c.ebb("flush", "/", "--wait")
        in_bucket(c, local)
        c.check_sound()
        c.down()
        c.up()
        m = c.mount()
        check(names(m) == names(local), f"seed {seed}: after a night in the bucket")
        return f"{json.dumps(done)}, {len(names(m))} names of {len({v[2] for v in names(m).values()})} files at the end"
