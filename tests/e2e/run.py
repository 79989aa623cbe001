#!/usr/bin/env python3
"""Runs the end-to-end tests: every function test_* of the modules below, each with clusters of its own.

    tests/e2e/run.py --ebb target/debug/ebb [--only SUBSTRING] [--soak N]
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402

MODULES = [
    "cycle",
    "full",
    "semantics",
    "outside",
    "kills",
    "lost_nodes",
    "replicas",
    "partitions",
    "bad_input",
    "foreign_s3",
    "benches",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ebb", default="ebb", help="the binary")
    parser.add_argument("--only", default="", help="run tests whose name contains this")
    parser.add_argument("--list", action="store_true", help="list the tests")
    parser.add_argument("--soak", type=int, default=None, help="rounds of the kill tests, of lost devices and of cuts")
    args = parser.parse_args()
    # So that whoever stops this leaves no mounts, servers and namespaces behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    harness.EBB = shutil.which(args.ebb) or os.path.abspath(args.ebb)
    if args.soak is not None:
        os.environ["EBB_SOAK"] = str(args.soak)
    tests = []
    for name in MODULES:
        module = importlib.import_module(name)
        tests += [(f"{name}.{n}", f) for n, f in vars(module).items() if n.startswith("test_")]
    tests = [(n, f) for n, f in tests if args.only in n]
    if args.list:
        for name, test in tests:
            print(f"{name:50} {(test.__doc__ or '').strip().splitlines()[0]}")
        return 0
    failed = []
    for name, test in tests:
        started = time.monotonic()
        try:
            said = test()
        except Exception as e:  # noqa: BLE001 -- every failure is reported, then the next test runs
            failed.append(name)
            print(f"FAIL {name} ({time.monotonic() - started:.1f} s): {e}", flush=True)
            if not isinstance(e, harness.Failure):
                traceback.print_exc()
        else:
            note = f": {said}" if said else ""
            print(f"ok   {name} ({time.monotonic() - started:.1f} s){note}", flush=True)
    print(f"{len(tests) - len(failed)} of {len(tests)} end-to-end tests passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
