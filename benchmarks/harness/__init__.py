"""What the benchmarks share with the tests: runs under a kernel memory limit, synthetic files, result files."""
