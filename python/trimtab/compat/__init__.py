"""Drop-ins for other packages' fused losses: their names and arguments, our kernels."""
