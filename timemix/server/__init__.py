"""The server: an API in the form of OpenAI's, states as values, and a page."""
