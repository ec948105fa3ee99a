"""Media files: what they may be, and decoding them."""
