"""Log-likelihood tasks from local files: items, what the model chooses, and how often that is right."""
