"""The method of the paper, one file for each of its parts, as functions of plain data.

Imports data, errors, ordered and text only. Callers pass in the function that asks the LLM, so that nothing here knows
of servers, settings, files or training.
"""
