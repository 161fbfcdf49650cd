"""From a volume to nuclei: the network pass, fusion, dynamics, stitching, blocks."""
