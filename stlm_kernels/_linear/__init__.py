"""What the ops of a linear projection share."""
