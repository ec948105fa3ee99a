"""Cards of model families: what is proved of each, on tiny configurations drawn at random."""
