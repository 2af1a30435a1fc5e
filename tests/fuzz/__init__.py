"""Random residual networks as source text, checked against every law: `python -m tests.fuzz`."""
