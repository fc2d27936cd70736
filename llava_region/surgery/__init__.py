"""New models out of finished ones, tensor by tensor: merge, revert, prune."""
