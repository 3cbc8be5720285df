"""The ggml backend: graphs on the CPU, computed straight from tier buffers."""
