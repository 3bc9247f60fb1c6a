"""Long-context tasks: items, a client for OpenAI-compatible servers, scores, and statistics of sparse against dense."""
