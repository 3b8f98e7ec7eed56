"""What a model holds: counted by the engine, and by a fresh process."""
