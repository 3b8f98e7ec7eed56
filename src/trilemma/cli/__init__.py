"""The command line: one file a command, each light to import; what is heavy loads when a command runs."""
