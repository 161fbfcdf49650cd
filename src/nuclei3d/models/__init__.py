"""A model as a folder: weights, model.json and a card."""
