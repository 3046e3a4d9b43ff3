"""The benchmark suite: `python -m benchmarks.run`. One file for each op, the same names again."""
