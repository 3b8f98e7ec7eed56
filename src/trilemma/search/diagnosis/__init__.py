"""What binds a model as it is deployed, found by interventions, and which remedies would help."""
