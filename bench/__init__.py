"""Speed and memory of every op beside plain PyTorch: `pytest bench/ --benchmark-only`."""
