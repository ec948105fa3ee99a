"""megatron-mimo's training layer: backends, recipes, data, layers, training."""
