"""Published benchmarks with every reducer and budget under one protocol."""
