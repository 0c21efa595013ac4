"""Timings of this package's kernels beside those of the engines, on the machine's own GPU."""
