"""Which strategy for a scenario: on the device, on a server, far away, or both; ranked, with what would change it."""
