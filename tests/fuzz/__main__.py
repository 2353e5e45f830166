"""``python -m tests.fuzz --kind folders --count 1000 --seed 0``: every fault with its seed, and a summary."""

import argparse
import sys
import time
from collections import Counter

from tests.fuzz.harness import run
from tests.fuzz.kinds import KINDS


def main() -> int:
    """0 if no case is at fault, else 1."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=list(KINDS), help="default: all of them")
    parser.add_argument("--count", type=int, default=1000, help="cases of each kind (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has one of its own (default: 0)")
    parser.add_argument("--verbose", action="store_true", help="tell of every case")
    chosen = parser.parse_args()
    failed = False
    for kind in chosen.kind:
        begin, tally, slowest, largest = time.monotonic(), Counter(), 0.0, 0
        for outcome in run(KINDS[kind], range(chosen.seed, chosen.seed + chosen.count)):
            tally["fault" if outcome.fault else "refused" if outcome.refused else "done"] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.growth)
            if outcome.fault or chosen.verbose:
                print(
                    f"{kind} {outcome.seed}: {outcome.description}\n    {outcome.fault or outcome.said.strip()[:300]}"
                )
                print("".join(f"    | {line}\n" for line in outcome.said.splitlines()[-3:] if outcome.fault), end="")
        failed = failed or tally["fault"] > 0
        took = time.monotonic() - begin
        print(
            f"{kind}: {tally['refused']} refused, {tally['done']} done, {tally['fault']} at fault; {took:.0f} s, the slowest "
            f"{slowest:.1f} s; {largest / 2**20:.0f} MiB at most"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
