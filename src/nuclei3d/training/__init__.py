"""From labelled volumes to trained weights."""
