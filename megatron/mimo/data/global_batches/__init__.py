"""Which samples an iteration trains on, in which sequences, and on which rank."""
