"""Using a trained model: generation, perplexity."""
