"""What the benchmark run and the commands share."""
