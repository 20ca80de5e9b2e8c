"""Files that are there whole or not at all, and verified checkpoints made of them."""
