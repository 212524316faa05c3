"""Inputs of the library's own models: what a processor made, read, and with fewer tokens again."""
