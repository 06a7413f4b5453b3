"""linspec as a server: a worker that steps an LLM for many callers, and the API that is spoken to it."""
