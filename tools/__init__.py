"""Tools that few people need, each run as `python -m tools.NAME`."""
