//! Weights on disk: Hugging Face folders, GGUF files and Hub ids, read lazily, written atomically. Knows no model:
//! names and shapes are what the file says.
