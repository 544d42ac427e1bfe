"""The method of the paper, one file for each of its parts, as functions of plain data.

Imports data, errors and text only. Whoever calls a part gives it the function that asks the LLM, so that nothing here
knows of servers, settings, files or training.
"""
