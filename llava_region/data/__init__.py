"""Training data in LLaVA's format: records, pictures, checks, subsets."""
