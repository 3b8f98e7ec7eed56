"""How good the answers are: likelihood, what changed against a reference, tasks, and whether it still writes."""
