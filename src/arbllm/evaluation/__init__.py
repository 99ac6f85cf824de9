"""What a model is worth: perplexity, generated text, seconds and memory."""
