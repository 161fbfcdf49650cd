"""From an image to labelled nuclei."""
