"""Networks. The attribute names of a module are a file format: checkpoints speak them."""
