"""How good a student each method makes, on real pairs: `python -m benchmarks.quality --help`."""
