"""Benchmarks: see README.md. Nothing of fastship imports this."""
