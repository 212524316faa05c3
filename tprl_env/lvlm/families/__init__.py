"""One file per family of LVLMs."""
