"""What the torch paths of several ops share."""
