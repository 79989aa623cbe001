"""Mistakes people make, and strangers at the door: clear words, an exit code, nothing lost."""

import json
import mmap
import os
import socket
import subprocess
from pathlib import Path

import harness
from harness import check, cluster, free_port


def refused(p, code, *words):
    check(p.returncode == code, f"exit {p.returncode} instead of {code}: {p.stderr}")
    for word in words:
        check(word.lower() in p.stderr.lower(), f"{word!r} is not in: {p.stderr}")
    check("panicked" not in p.stderr, f"a panic is no error message: {p.stderr}")


def test_up_explains_what_is_wrong():
    """--nodes 0, a strange directory, busy ports, wrong buckets."""
    with cluster(start=False) as c:
        refused(c.ebb("up", "--detach", "--nodes", 0, ok=False), 2, "at least one data node")
        c.dir.mkdir(parents=True)
        (c.dir / "thesis.tex").write_text("precious")
        refused(c.ebb("up", "--detach", ok=False), 1, "not empty")
        check((c.dir / "thesis.tex").read_text() == "precious", "untouched")
        (c.dir / "thesis.tex").unlink()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = s.getsockname()[1]
            refused(c.ebb("up", "--detach", "--meta-port", port, ok=False), 2, "port", "in use")
        refused(c.ebb("up", "--detach", "--bucket", "bucket", ok=False), 2, "s3://")
        refused(c.ebb("status", ok=False), 3, "ebb up")
        refused(c.ebb("down", ok=False), 3, "no cluster")
        refused(c.ebb("mount", c.dir.parent / "nowhere", ok=False), 2, "mkdir")
        refused(c.ebb("umount", c.dir.parent, ok=False), 2, "nothing is mounted")


def test_wrong_s3_is_told_in_words():
    """No server there, no such bucket, wrong keys."""
    with cluster(start=False) as c:
        c.extra_env = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
        url = f"http://127.0.0.1:{free_port()}"
        refused(c.ebb("up", "--detach", "--bucket", "s3://b", "--s3-endpoint", url, ok=False), 4, "s3")
    with cluster() as c:
        url = c.s3_env()["AWS_ENDPOINT_URL"]
        other = harness.Cluster(c.dir.parent / "other")
        other.extra_env = {k: v for k, v in c.s3_env().items() if k.startswith("AWS_")}
        try:
            refused(other.ebb("up", "--detach", "--bucket", "s3://not-there", "--s3-endpoint", url, ok=False), 4, "not-there")
        finally:
            other.destroy()
        wrong = harness.Cluster(c.dir.parent / "wrong")
        wrong.extra_env = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
        try:
            refused(wrong.ebb("up", "--detach", "--bucket", "s3://ebb", "--s3-endpoint", url, ok=False), 4, "s3")
        finally:
            wrong.destroy()


def test_strangers_change_nothing():
    """Garbage and a wrong key on every port; the mount goes on."""
    with cluster() as c:
        m = c.mount()
        (m / "f").write_text("safe")
        s = c.status()
        ports = [p for n in s["map"]["nodes"] for p in n["ports"]]
        import json
        ports.append(int(json.loads((c.dir / "run/endpoints.json").read_text())["meta"][0].rsplit(":", 1)[1]))
        for port in ports:
            for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"EBB1" + b"\0" * 60, os.urandom(3000)):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                    sock.sendall(junk)
                    try:
                        sock.shutdown(socket.SHUT_WR)
                        check(sock.recv(100) == b"", "nothing is said to a stranger")
                    except OSError:
                        pass
        key = c.dir.parent / "key"
        key.write_text("00" * 32)
        meta = f"127.0.0.1:{ports[-1]}"
        p = c.ebb("--cluster", meta, "--key-file", key, "status", ok=False)
        refused(p, 3, "key")
        check((m / "f").read_text() == "safe", "unharmed")
        (m / "g").write_text("still writable")


def test_cached_files_are_served_while_s3_is_down():
    """The S3 server stops; what is cached is read, what is written stays dirty and gets there later."""
    import signal
    with cluster() as c:
        m = c.mount()
        (m / "f").write_bytes(b"cached" * 10_000)
        c.ebb("flush", "/", "--wait")
        os.kill(c.pid("s3"), signal.SIGSTOP)
        try:
            check((m / "f").read_bytes() == b"cached" * 10_000, "cached data without S3")
            (m / "g").write_text("dirty")
            check((m / "g").read_text() == "dirty", "writes go on")
        finally:
            os.kill(c.pid("s3"), signal.SIGCONT)
        c.ebb("flush", "/", "--wait")
        check(c.bucket_sizes().get("g") == 5, "and it gets there")


def test_a_full_device_makes_writers_wait_not_fail():
    """Twice the devices' space is written: clean data goes, dirty data is flushed."""
    with cluster(nodes=1, node_capacity="256MiB", flush_after=1000) as c:
        m = c.mount()
        block = os.urandom(1 << 20)
        total = 400
        for i in range(total // 20):
            with open(m / f"f{i}", "wb") as f:
                for j in range(20):
                    f.write(bytes([i, j]) + block[2:])
        for i in range(total // 20):
            with open(m / f"f{i}", "rb") as f:
                for j in range(20):
                    check(f.read(1 << 20) == bytes([i, j]) + block[2:], f"f{i} block {j}")


def test_help_and_versions_are_there():
    """--help of every command."""
    p = subprocess.run([harness.EBB, "--help"], capture_output=True, text=True)
    check(p.returncode == 0, p.stderr)
    for command in ("up", "down", "status", "scale", "mount", "umount", "cp", "ls", "cat", "stat", "mkdir", "mv", "rm", "flush", "bench"):
        q = subprocess.run([harness.EBB, command, "--help"], capture_output=True, text=True)
        check(q.returncode == 0 and "Usage" in q.stdout, f"ebb {command} --help")
    check(Path(harness.EBB).exists(), "the binary")


def test_fsck_finds_what_is_damaged_on_a_device():
    """A sound device, one that is in use, one with a flipped bit, one of another kind."""
    with cluster(nodes=1) as c:
        m = c.mount()
        data = os.urandom(1 << 20)
        (m / "f").write_bytes(data)
        (m / "small").write_text("small")
        device, = c.dir.glob("nodes/node-*/shard-0.ebb")
        refused(c.ebb("fsck", "--device", device, ok=False), 1, "1 of 1 devices")
        check("in use" in c.ebb("fsck", "--device", device, ok=False).stdout, "says why")
        c.down("--keep")
        check(c.ebb("fsck", "--device", device).stdout.rstrip().endswith("sound"), "nothing to report")
        report, = json.loads(c.ebb("fsck", "--json", "--device", device).stdout)
        check(report["bytes_compared"] > len(data) and report["bad_blocks"] == [], str(report))
        with open(device, "r+b") as f:
            with mmap.mmap(f.fileno(), 0) as all_of_it:
                at = all_of_it.find(data[8192:12288])
                check(at > 0 and at % 4096 == 0, "the block is on the device")
                all_of_it[at + 77] ^= 1
        p = c.ebb("fsck", "--device", device, ok=False)
        refused(p, 1, "1 of 1 devices")
        check(f"bad block at {at}:" in p.stdout and "DIRTY" in p.stdout, p.stdout)
        with open(device, "r+b") as f:
            f.seek(at + 77)
            f.write(bytes([data[8192 + 77]]))
        check(c.ebb("fsck", "--device", device).returncode == 0, "as it was")
        c.up()
        check((c.mount() / "f").read_bytes() == data, "and nothing was changed by looking")
        c.down()
        garbage = c.dir.parent / "garbage"
        garbage.write_bytes(os.urandom(1 << 20))
        refused(c.ebb("fsck", "--device", garbage, c.dir / "nothing", ok=False), 1, "2 of 2 devices")
