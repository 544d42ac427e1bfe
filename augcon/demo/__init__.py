"""Stand-ins for where no language model can run: a server that answers AugCon's prompts by rules (``engine.py``,
``rules.py``), and a chat model of random weights to train (``tiny_model.py``). Imports data, errors and text only."""
