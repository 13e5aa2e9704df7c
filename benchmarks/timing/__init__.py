"""How the benchmarks measure: checks, time in turn, peak memory, fresh processes, options."""
