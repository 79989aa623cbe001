"""The plain path against somebody else's S3 server."""

import contextlib
import shutil
import socket
import subprocess

from harness import Failure, cluster, digest, free_port, make_tree, same, wait_for


@contextlib.contextmanager
def moto():
    program = shutil.which("moto_server")
    if not program:
        raise Failure("moto_server is missing: pip install 'moto[server]'")
    port = free_port()
    p = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def serves():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
    try:
        wait_for("moto to serve", serves, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        p.kill()
        p.wait()


def test_plain_path_against_moto():
    """Copy in, flush, down, up, diff, with another server's conditions."""
    with moto() as url, cluster(start=False) as c:
        c.extra_env = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1",
                       "AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
        subprocess.run(["s5cmd", "mb", "s3://ebb"], env=c.env(), check=True, stdout=subprocess.DEVNULL)
        tree = make_tree(c.dir.parent / "tree", 150, seed=3)
        want = digest(tree)
        c.up(bucket="s3://ebb/some/prefix", s3_endpoint=url)
        m = c.mount()
        subprocess.run(["cp", "-a", str(tree), str(m / "tree")], check=True)
        c.ebb("flush", "/", "--wait")
        c.down()
        shutil.rmtree(c.dir)
        c.up(bucket="s3://ebb/some/prefix", s3_endpoint=url)
        same(want, digest(c.mount() / "tree"), "after everything but the bucket was wiped")
        return "; ".join(c.status()["warnings"]) or "all conditions are there"
