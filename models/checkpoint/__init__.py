"""GGUF files and Hugging Face folders, parsed and checked against the size of the files."""
