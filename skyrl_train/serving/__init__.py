"""OpenAI's protocol over an engine. Needs FastAPI; nothing outside `entrypoints` imports this package."""
