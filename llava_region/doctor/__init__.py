"""What is installed, whether training can work with it, and how to fix what is broken."""
