"""Running the encoders of a forward, and standing in for those without inputs."""
