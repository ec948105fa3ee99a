"""The language model of a micro-batch: what it reads, how it is called, what its heads give."""
