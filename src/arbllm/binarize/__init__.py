"""Mathematics of one block: tensors in, a `Block` out. No modules, no files, no devices chosen."""
