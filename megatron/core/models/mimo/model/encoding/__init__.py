"""Running encoders where all modules share Megatron's process groups."""
