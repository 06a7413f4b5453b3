"""What studies and benchmarks share: cells on disk, checks of a plan, pages, the command line."""
