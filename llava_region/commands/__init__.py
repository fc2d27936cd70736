"""One file a subcommand: its options and help, and one call of the function that does the work."""
