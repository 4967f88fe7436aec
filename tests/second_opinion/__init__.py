"""The model held against implementations that were written by others, over random tables.

Each test says what its opinion is independent in, and what it cannot judge. What differs is a fault of
the model, or is listed with its reason in the test.
"""
