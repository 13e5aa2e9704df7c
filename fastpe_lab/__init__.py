"""What `benchmarks/` and `examples/` share: songs, the literature's attention systems, timing."""
