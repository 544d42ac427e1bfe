"""A run on this machine: its corpus, its results folder, its record, its figures, and what comes next.

Imports everything but train and machine. No part of the method lives here, and nothing here asks the LLM.
"""
