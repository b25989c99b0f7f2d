"""The four published algorithms, each short enough to read beside its paper."""
