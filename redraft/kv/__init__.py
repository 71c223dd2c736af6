"""The memory of sequences: pages of keys and values, and the methods that edit, encode and read them."""
