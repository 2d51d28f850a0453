"""How fast: ours against what people write today. ``python -m benchmarks.run`` measures."""
