"""Volumes with axes and voxel size: reading, writing, data sets of embryos."""
