"""Planes, crops, augmentation, losses and the training loop."""
