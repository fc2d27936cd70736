"""Train a region with an upstream's own trainer: check, estimate, hook, audit, save, resume."""
