"""What the tiny twins of the recipes train on: a tokenizer made on the spot, digits and tones."""
