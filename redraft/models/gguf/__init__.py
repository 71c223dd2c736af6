"""GGUF files, the format of llama.cpp: one file holds the weights, the architecture and the tokenizer."""
