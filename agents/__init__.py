"""Agents learn policies, mostly by the algorithms of RLlib. They need the `train` extra."""
