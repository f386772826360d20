"""OpenAI's API, as its clients speak it: bodies in, chunks and completions out. Knows the pipeline's nouns only."""
