"""The oracles: every family in plain PyTorch."""
