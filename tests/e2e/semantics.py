"""What POSIX promises and docs/SEMANTICS.md says we keep, through real mounts."""

import errno
import os
import subprocess
import threading

from harness import check, cluster, digest, same, wait_for


def expect(code, call, what):
    try:
        call()
    except OSError as e:
        check(e.errno == code, f"{what}: {errno.errorcode[e.errno]} instead of {errno.errorcode[code]}")
        return
    check(False, f"{what}: succeeded instead of {errno.errorcode[code]}")


def test_everyday_calls():
    """Create, link, rename, truncate, append, unlink-while-open, statfs and their errors."""
    with cluster() as c:
        m = c.mount()
        (m / "d/e").mkdir(parents=True)
        (m / "d/f").write_text("hello")
        fd = os.open(m / "x", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
        check(os.fstat(fd).st_mode & 0o7777 == 0o640, "mode of a created file")
        expect(errno.EEXIST, lambda: os.open(m / "x", os.O_CREAT | os.O_EXCL), "O_EXCL")
        os.write(fd, b"0123456789")
        os.unlink(m / "x")
        check(os.pread(fd, 10, 0) == b"0123456789", "an unlinked open file lives on")
        os.write(fd, b"more")
        check(os.fstat(fd).st_size == 14, "and grows")
        check(not os.isatty(fd), "no terminal")
        check("ioctl" not in (c.dir / "log/mount.log").read_text(), "and nothing said about being asked")
        os.close(fd)
        expect(errno.ENOENT, lambda: os.stat(m / "x"), "it is gone")
        with open(m / "app", "ab") as f:
            f.write(b"one")
        with open(m / "app", "ab") as f:
            f.write(b"two")
        check((m / "app").read_bytes() == b"onetwo", "O_APPEND")
        os.truncate(m / "app", 2)
        os.truncate(m / "app", 5)
        check((m / "app").read_bytes() == b"on\0\0\0", "truncate then extend reads zeros")
        with open(m / "app", "wb"):
            pass
        check((m / "app").stat().st_size == 0, "O_TRUNC")
        expect(errno.ENOTEMPTY, lambda: os.rmdir(m / "d"), "rmdir of a full directory")
        expect(errno.EISDIR, lambda: os.unlink(m / "d"), "unlink of a directory")
        expect(errno.ENOTDIR, lambda: os.listdir(m / "d/f"), "listing a file")
        expect(errno.ENOTDIR, lambda: os.stat(m / "d/f/g"), "a file as a directory")
        expect(errno.ENAMETOOLONG, lambda: os.stat(m / ("n" * 256)), "256 bytes of name")
        (m / ("n" * 255)).write_text("long")
        os.symlink("d/f", m / "s")
        check((m / "s").read_text() == "hello" and os.readlink(m / "s") == "d/f", "symlink")
        os.rename(m / "d/f", m / "app")
        check((m / "app").read_text() == "hello", "rename over a file")
        os.rename(m / "d", m / "d2")
        check(sorted(os.listdir(m)) == sorted(["app", "d2", "s", "n" * 255]), "names after rename")
        expect(errno.EINVAL, lambda: os.rename(m / "d2", m / "d2/e/x"), "rename into itself")
        os.chmod(m / "app", 0o4711)
        os.chown(m / "app", 123, 456)
        os.utime(m / "app", ns=(1, 1_234_567_890_123_456_789))
        st = os.stat(m / "app")
        check((st.st_mode & 0o7777, st.st_uid, st.st_gid, st.st_mtime_ns)
              in ((0o4711, 123, 456, 1_234_567_890_123_456_789), (0o711, 123, 456, 1_234_567_890_123_456_789)),
              f"attributes: {st}")
        sf = os.statvfs(m)
        check(sf.f_blocks > 0 and sf.f_namemax == 255, "statfs")


def test_two_mounts_are_close_to_open_consistent():
    """What one mount closed, the other sees at its next open."""
    with cluster() as c:
        a, b = c.mount("a"), c.mount("b")
        for i in range(30):
            (a / "f").write_text(f"version {i}" * (i + 1))
            check((b / "f").read_text() == f"version {i}" * (i + 1), f"round {i}")
            (b / "g").write_text(f"{i}")
            check((a / "g").read_text() == f"{i}", f"and back, round {i}")
        (a / "dir").mkdir()
        check((b / "dir").is_dir(), "a directory")
        os.rename(a / "f", a / "dir/f2")
        wait_for("the rename on the other mount", lambda: sorted(os.listdir(b)) == ["dir", "g"], 5)


def test_rename_over_then_flush_keeps_the_new_content():
    """objcache lost this: write a temporary file, rename it over, flush."""
    with cluster() as c:
        m = c.mount()
        for i in range(10):
            (m / "ckpt").write_text(f"old {i}")
            (m / "tmp").write_text(f"new {i}")
            os.rename(m / "tmp", m / "ckpt")
            c.ebb("flush", "/", "--wait")
            check(c.s5cmd("cat", "s3://ebb/ckpt").stdout == f"new {i}", f"round {i}")
            check(c.bucket_sizes().keys() == {"ckpt"}, "one object")


def test_cold_rename_then_append_keeps_the_file():
    """objcache lost both keys."""
    with cluster() as c:
        c.s5cmd("pipe", "s3://ebb/a/cold", data="cold bytes,")
        m = c.mount()
        os.rename(m / "a/cold", m / "a/renamed")
        for word in ("one,", "two,"):
            with open(m / "a/renamed", "a") as f:
                f.write(word)
            c.ebb("flush", "/", "--wait")
        want = "cold bytes,one,two,"
        check((m / "a/renamed").read_text() == want, "through the mount")
        check(c.bucket_sizes() == {"a/renamed": len(want)}, "in the bucket")
        c.down()
        c.up()
        check((c.mount() / "a/renamed").read_text() == want, "after a night in the bucket")


def test_rmdir_does_not_come_back():
    """objcache left the marker."""
    with cluster() as c:
        m = c.mount()
        (m / "d/sub").mkdir(parents=True)
        c.ebb("flush", "/", "--wait")
        os.rmdir(m / "d/sub")
        os.rmdir(m / "d")
        c.down()
        c.up()
        check(os.listdir(c.mount()) == [], "gone for good")


def test_unlink_and_recreate_during_upload():
    """The delete of a predecessor never hits its successor."""
    with cluster() as c:
        m = c.mount()
        for i in range(10):
            (m / "f").write_bytes(os.urandom(300_000))
            flush = threading.Thread(target=lambda: c.ebb("flush", "/", "--wait"))
            flush.start()
            os.unlink(m / "f")
            (m / "f").write_text(f"NEW-DATA {i}")
            flush.join()
            c.ebb("flush", "/", "--wait")
            check(c.s5cmd("cat", "s3://ebb/f").stdout == f"NEW-DATA {i}", f"round {i}")


def test_writes_during_flushes_are_kept():
    """Writers go on while a flush runs; two writers on two mounts."""
    with cluster() as c:
        mounts = [c.mount("a"), c.mount("b")]
        size, rounds = 1 << 20, 12
        (mounts[0] / "f").write_bytes(bytes(2 * size))
        stop = threading.Event()
        errors = []

        def flusher():
            while not stop.is_set():
                c.ebb("flush", "/", "--wait")

        def writer(i):
            try:
                for n in range(1, rounds + 1):
                    fd = os.open(mounts[i] / "f", os.O_RDWR)
                    for at in range(0, size, 64 << 10):
                        os.pwrite(fd, bytes([n]) * (64 << 10), i * size + at)
                    os.fsync(fd)
                    os.close(fd)
            except Exception as e:  # noqa: BLE001
                errors.append(e)

        threads = [threading.Thread(target=writer, args=(i,)) for i in range(2)]
        flushing = threading.Thread(target=flusher)
        flushing.start()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        stop.set()
        flushing.join()
        check(not errors, f"writers failed: {errors}")
        c.ebb("flush", "/", "--wait")
        got = c.dir.parent / "got"
        c.s5cmd("cp", "s3://ebb/f", got)
        want = bytes([rounds]) * (2 * size)
        check((mounts[0] / "f").read_bytes() == want, "through the mount")
        check(got.read_bytes() == want, "in the bucket")


def test_real_programs_run_on_the_mount():
    """git and tar: locks, renames, many small files."""
    with cluster() as c:
        m = c.mount()
        src = c.dir.parent / "src"
        src.mkdir()
        for i in range(300):
            (src / f"f{i}.c").write_text(f"int f{i}(void) {{ return {i}; }}\n" * (i % 40 + 1))
        subprocess.run(["tar", "-C", str(c.dir.parent), "--format=posix", "-cf", str(c.dir.parent / "src.tar"), "src"], check=True)
        subprocess.run(["tar", "-C", str(m), "-xf", str(c.dir.parent / "src.tar")], check=True)
        same(digest(src), digest(m / "src"), "tar x")
        git = ["git", "-C", str(m / "src"), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "safe.directory=*"]
        for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["fsck", "--strict"], ["gc", "-q"]):
            subprocess.run([*git, *args], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        status = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True)
        check(status.stdout == "", "git sees its own files unchanged")
