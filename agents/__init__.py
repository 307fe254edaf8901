"""Agents: what learns; RLlib first. They need the `train` extra."""
