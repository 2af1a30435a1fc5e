"""The parts of `zoo_coverage.py`: models, the oracle that checks tickets, children, documents."""
