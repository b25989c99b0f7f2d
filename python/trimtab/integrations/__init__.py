"""Adapters for other packages: lazy, reversible, version-gated."""
