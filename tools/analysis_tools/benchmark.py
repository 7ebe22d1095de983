"""Run a benchmark of this repository: ``benchmark.py COMMAND [options]``; ``--help`` lists them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks.command import main

if __name__ == '__main__':
    main()
