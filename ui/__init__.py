"""The page: knows Gradio; never torch, transformers, SQL or processes."""
