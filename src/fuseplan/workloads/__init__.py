"""Models to explain, tune and time: built in, from Hugging Face configurations, and the user's own."""
