"""A whole model: open it, find its decoder blocks, and binarize their linears one block at a time."""
