#!/usr/bin/env python3
"""Runs the end-to-end tests: every function test_* of the modules below, each with clusters and a process of its own.

    tests/e2e/run.py --ebb target/debug/ebb [--only SUBSTRING] [--soak N]

A test that hangs is a failure like any other: it says where everybody stands, and the next one runs.
"""

import argparse
import faulthandler
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402
import network  # noqa: E402

MODULES = [
    "cycle",
    "full",
    "semantics",
    "outside",
    "kills",
    "voters",
    "histories",
    "leases",
    "lent",
    "links",
    "locks",
    "xattrs",
    "disaster",
    "lost_nodes",
    "replicas",
    "partitions",
    "bad_input",
    "foreign_s3",
    "benches",
]
# After so many tests that did not end, something is wrong with all of them.
MOST_HUNG = 3


def tests():
    """By name, in the order they run in."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found.update({f"{name}.{n}": f for n, f in vars(module).items() if n.startswith("test_")})
    return found


def run_one(name):
    """Runs a test in this process; the exit code says how it went."""
    # So that whoever stops this leaves no mounts, servers and namespaces behind, and whoever asks sees where it stands.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    started = time.monotonic()
    try:
        said = tests()[name]()
    except Exception as e:  # noqa: BLE001 -- every failure is reported
        print(f"FAIL {name} ({time.monotonic() - started:.1f} s): {e}", flush=True)
        if not isinstance(e, harness.Failure):
            traceback.print_exc()
        code = 1
    else:
        print(f"ok   {name} ({time.monotonic() - started:.1f} s){f': {said}' if said else ''}", flush=True)
        code = 0
    sys.stderr.flush()
    # Without waiting for threads that a failed test left in a call.
    os._exit(code)


def run(name, limit):
    """Runs a test in a process of its own, for `limit` seconds at most. What it started is gone afterwards. How it ended."""
    mark = harness.Mark()
    command = [sys.executable, __file__, "--ebb", harness.EBB, "--one", name]
    process = subprocess.Popen(command, env={**os.environ, **mark.env}, start_new_session=True)
    try:
        return "ok" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        print(f"FAIL {name}: it did not end within {limit} s. What stands where:", flush=True)
        process.send_signal(signal.SIGUSR1)
        mark.describe()
        return "hung"
    finally:
        mark.sweep()
        process.wait()
        network.sweep()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ebb", default="ebb", help="the binary")
    parser.add_argument("--only", default="", help="run tests whose name contains this")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="list the tests")
    parser.add_argument("--soak", type=int, default=None, help="rounds of the kill tests, of lost devices and of cuts")
    parser.add_argument("--limit", type=float, default=None, help="seconds that a test may take (300, times the rounds of a soak)")
    args = parser.parse_args()
    harness.EBB = shutil.which(args.ebb) or os.path.abspath(args.ebb)
    if args.one:
        return run_one(args.one)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.soak is not None:
        os.environ["EBB_SOAK"] = str(args.soak)
    limit = args.limit or 300.0 * max(1, args.soak or 1)
    chosen = {n: f for n, f in tests().items() if args.only in n}
    if args.list:
        for name, test in chosen.items():
            print(f"{name:50} {(test.__doc__ or '').strip().splitlines()[0]}")
        return 0
    ended = []
    for name in chosen:
        ended.append(run(name, limit))
        if ended.count("hung") == MOST_HUNG:
            print(f"{MOST_HUNG} tests hung: the rest is not run")
            break
    print(f"{ended.count('ok')} of {len(chosen)} end-to-end tests passed")
    return 0 if ended.count("ok") == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
