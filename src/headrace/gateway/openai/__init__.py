"""OpenAI's interface at a door: models, chat, completions, embeddings, files and batches."""
