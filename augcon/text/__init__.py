"""Text and nothing else: its units (``units``), the prompts, what a model's reply means (``parse``), and what is wrong
with an answer (``checks``). Imports data and errors only."""
