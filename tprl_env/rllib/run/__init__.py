"""One training run: its folder, its loop, its resources, sending it to a cluster."""
