"""The parts of `benchmarks/recovery.py`, one network each."""
