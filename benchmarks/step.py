"""One training step of zgraph beside its peers: losses, time, memory and bytes moved, in one run.

    python benchmarks/step.py                     the small GPT, every peer
    python benchmarks/step.py --quick             a tiny GPT, in a minute: does everything run?
    python benchmarks/step.py --slope             bytes per parameter, between two depths
    python benchmarks/step.py --cap 2GiB          the deepest GPT that trains under a cap per rank (root)

Machines are noisy, so peers take turns step by step and are compared within each round; README.md has the method.
"""

from __future__ import annotations

import sys

from memory import load_malloc_counter


def main() -> int:
    """Get the allocation counter in place, which starts the program anew, and only then import torch."""
    try:
        load_malloc_counter({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"})
    except RuntimeError as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    from command import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
