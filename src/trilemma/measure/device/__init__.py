"""What a machine can do, and what a model would cost on one that is not here."""
