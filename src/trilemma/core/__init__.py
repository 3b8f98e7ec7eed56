"""Plain records and errors that every other room speaks in. Imports nothing of ours and no torch."""
