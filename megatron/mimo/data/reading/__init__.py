"""Records to samples, one at a time: reading them, and measuring them without decoding."""
