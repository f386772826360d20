"""Benchmarks, one a file; run them with `bin/bench NAME`."""
