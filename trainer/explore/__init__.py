"""A page that shows what a trained run learned; only this folder imports Gradio."""
