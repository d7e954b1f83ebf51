"""Predictions beside real steps on this machine: seconds, live and resident bytes.

    python benchmarks/here.py                  17 pairs of model and options, one and two ranks, in about 8 minutes
    python benchmarks/here.py --quick          two tiny ones, in half a minute: does everything run?
    python benchmarks/here.py --markdown DOC   and the table into DOC, between its marks
    python benchmarks/here.py --write          and the errors into zgraph, where plans quote them

Run ``zgraph calibrate`` on the quiet machine before: predictions of seconds rest on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memory import load_malloc_counter


def main() -> int:
    """Get the allocation counter in place, which starts the program anew, and only then import torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tiny pairs")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each pair (default: 5)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every pair here, one JSON object a line")
    parser.add_argument("--markdown", type=Path, metavar="DOC", help="write the table between the marks of a document")
    parser.add_argument("--write", action="store_true", help="let plans on a CPU quote these errors")
    options = parser.parse_args()
    try:
        load_malloc_counter({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"})
    except RuntimeError as error:
        print(f"here.py: {error}", file=sys.stderr)
        return 2
    from pairs import report

    return report(options)


if __name__ == "__main__":
    sys.exit(main())
