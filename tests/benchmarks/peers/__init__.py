"""The tasks, troubles and rules of bench_peers.py, one training under a rule, and its table."""
