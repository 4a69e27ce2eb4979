"""Speed and memory of every op beside stock PyTorch: `pytest bench/ --benchmark-only`."""
