"""Hooks, training strategies and the parts that the command-line tools share."""
